"""What the launcher reads while its ranks run."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from translution.distributed.launcher import local_processes
from translution.distributed.launcher.local_processes import MetricsReader, wait_for_moves
from translution.distributed.runs.progress import RankProgress, progress_path
from translution.distributed.runs.rank_watch import HangLimits, RankWatch


def test_a_damaged_line_of_the_metrics_is_left_out(tmp_path: Path) -> None:
    path, seen = tmp_path / "metrics.jsonl", list[Mapping[str, Any]]()
    reader = MetricsReader(path, seen.append)
    reader.poll()
    path.write_bytes(
        b'{"event": "step", "step": 1}\n{"step": 7}\n{"st\n\x00\x00\n'
        + 100_000 * b"["
        + b'\n{"event": "step", "step": 2}\n'
    )
    with path.open("ab") as file:
        file.write(b'{"event": "step", "step": 3')
    reader.poll()
    assert [line["step"] for line in seen] == [1, 2]
    with path.open("ab") as file:
        file.write(b"}\n")
    reader.poll()
    assert seen[-1] == {"event": "step", "step": 3}


@pytest.mark.parametrize(
    ("phase", "hung_phase", "limits", "ended"),
    [
        ("checkpoint save", "forward", HangLimits(step_s=100.0, slow_s=300.0), True),
        ("forward", "forward", HangLimits(step_s=100.0, slow_s=300.0), False),
        ("checkpoint save", "checkpoint save", HangLimits(step_s=100.0, slow_s=300.0), False),
        ("checkpoint save", "forward", None, False),
    ],
)
def test_a_checkpoint_that_is_saved_after_a_hang_may_take_longer_than_a_phase_of_a_step(
    phase: str,
    hung_phase: str,
    limits: HangLimits | None,
    ended: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "control").mkdir()
    at = RankProgress(rank=0, pid=os.getpid(), host="here", step=5, steps_begun=5, phase=phase, moves=40)
    progress_path(tmp_path, 0).write_text(at.model_dump_json())
    progress_path(tmp_path, 1).write_text(at.model_copy(update={"rank": 1, "phase": "forward"}).model_dump_json())
    watch = RankWatch(tmp_path, range(2), 2, limits)
    watch.hung = at.model_copy(update={"phase": hung_phase})
    monkeypatch.setattr(local_processes, "HUNG_SECONDS", 0.0)
    looks = iter([None, None, None, 0])
    process = SimpleNamespace(poll=lambda: next(looks, 0))
    assert wait_for_moves(process, watch) is ended  # type: ignore[arg-type]
