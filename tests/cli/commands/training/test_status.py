"""`translution status` tells a rank that trains from one whose process has died."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.runs import write_plan

from translution.cli.main import run as run_command
from translution.distributed.runs.folder import new_run_folder
from translution.distributed.runs.progress import RankProgress, progress_path
from translution.distributed.runs.status import RankStatus, write_status
from translution.distributed.system.filesystem import try_lock


def test_a_rank_whose_process_has_died_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = new_run_folder(write_plan(tmp_path / "plan", 2, nodes=2), None)
    (folder / "control").mkdir()
    held = try_lock(folder / "control" / "rank_0.lock", create=True)
    assert held is not None
    (folder / "control" / "rank_1.lock").touch()
    for rank in range(2):
        write_status(folder, RankStatus(rank=rank, state="training", step=5))
        place = RankProgress(rank=rank, pid=1, host="node1", step=8, phase="backward")
        progress_path(folder, rank).write_text(place.model_dump_json())
    write_status(folder, RankStatus(rank=2, state="evaluating", step=7))

    assert run_command(["status", str(folder)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(", 20")[0] for line in lines] == [
        "rank 0: training at step 8, in backward",
        "rank 1: died while training at step 8, in backward",
        "rank 2: evaluating at step 7",  # Without a lock nobody knows.
        "rank 3: never started",
    ]
    assert run_command(["status", str(folder), "--json"]) == 1
    assert [rank["dead"] for rank in json.loads(capsys.readouterr().out)["ranks"]] == [False, True, False]
