"""What the launcher reads while its ranks run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers.waiting import wait_until

from translution.distributed.launcher import local_processes
from translution.distributed.launcher.local_processes import MetricsReader, wait_for_moves
from translution.distributed.runs.folder import log_path, status_path
from translution.distributed.runs.progress import RankProgress, progress_path, read_progress
from translution.distributed.runs.rank_watch import HangLimits, RankWatch, process_state


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


RANK = """
import json, os, sys, threading, time
from pathlib import Path
from translution.distributed.runs import progress, status
run, rank, progress.HEARTBEAT_SECONDS = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
progress.Progress().open(run, rank)
status.write_status(run, status.RankStatus(rank=rank, state="training", pid=os.getpid()))
threading.Thread(target=lambda: [time.sleep(0.2) for _ in range(10**6)], daemon=True).start()
threading.Thread(target=lambda: os._exit(len(sys.stdin.read())), daemon=True).start()
def deep(levels):
    return deep(levels - 1) + 1 if levels else len(json.dumps({"a": [1, {"b": 2}]}))
print("runs", flush=True)
while True:
    sum(deep(levels % 30) for levels in range(50))
"""


def test_a_stopped_rank_prints_its_stacks_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal that reaches a stopped process may be handled by any of its threads, while another one runs Python."""
    for path in (progress_path(tmp_path, 0), status_path(tmp_path, 0), log_path(tmp_path, 0)):
        path.parent.mkdir(exist_ok=True)
    monkeypatch.setattr(local_processes, "HEARTBEAT_SECONDS", 0.1)
    monkeypatch.setattr(local_processes, "_STACKS_SECONDS", 0.1)
    ranks: list[subprocess.Popen[bytes]] = []
    try:
        for rank, heartbeat_seconds in enumerate(("600", "0.02")):
            words = [sys.executable, "-c", RANK, str(tmp_path), str(rank), heartbeat_seconds]
            group, pipe = ranks[0].pid if ranks else 0, subprocess.PIPE
            with log_path(tmp_path, rank).open("wb") as log:
                ranks.append(subprocess.Popen(words, process_group=group, stdin=pipe, stdout=pipe, stderr=log))
        for process in ranks:
            assert process.stdout is not None
            assert process.stdout.readline() == b"runs\n"
        wait_until(lambda: all((at := read_progress(tmp_path, rank)) and at.heartbeat for rank in range(2)))
        for _ in range(8):
            os.kill(ranks[1].pid, signal.SIGSTOP)
            wait_until(lambda: ranks[1].poll() is not None or process_state(ranks[1].pid).stopped)
            local_processes._print_stacks(ranks[0], tmp_path)
            assert ranks[1].poll() is None
            assert not process_state(ranks[1].pid).stopped
        wait_until(lambda: all("in <module>" in log_path(tmp_path, rank).read_text() for rank in range(2)))
        assert "_report_forever" in log_path(tmp_path, 1).read_text()
    finally:
        for process in ranks:
            process.kill()
            process.communicate()
