"""What a rank says of itself while it runs, and when it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from helpers.waiting import wait_until

from translution.distributed.runs.folder import status_path
from translution.distributed.runs.heartbeat import control_path
from translution.distributed.runs.progress import STACKS_REQUEST, Progress, RankProgress, progress_path, read_progress
from translution.distributed.runs.status import RankStatus, clear_statuses, write_status

PROGRAM = """
import sys
from pathlib import Path
from translution.distributed.runs.progress import Progress
progress = Progress()
progress.open(Path(sys.argv[1]), 1)
for line in sys.stdin:
    if line.strip() == "step":
        progress.begin_step(6)
    else:
        progress.move(line.strip())
    print("done", flush=True)
"""


def found(run: Path) -> RankProgress:
    progress = read_progress(run, 1)
    assert progress is not None
    return progress


def test_a_rank_says_where_it_is_and_that_it_runs_and_prints_its_stacks(tmp_path: Path) -> None:
    (tmp_path / "control").mkdir()
    command = [sys.executable, "-c", PROGRAM, str(tmp_path)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        for number, (word, place) in enumerate(
            [("forward", "in forward"), ("step", ""), ("backward", "at step 7, in backward")]
        ):
            process.stdin.write(f"{word}\n")
            process.stdin.flush()
            assert process.stdout.readline() == "done\n"
            here = found(tmp_path)
            # A step is written with its first phase.
            assert not place or (here.place, here.moves) == (place, max(1, number))
        assert (here.rank, here.pid, here.steps_begun) == (1, process.pid, 1)
        wait_until(lambda: found(tmp_path).heartbeat > here.heartbeat)
        assert found(tmp_path).moves == 2
        process.send_signal(signal.SIGUSR2)
        assert process.stderr.readline().startswith("Thread 0x")
        control_path(tmp_path, STACKS_REQUEST).touch()
        wait_until(lambda: any("Current thread" in process.stderr.readline() for _ in range(20)))
        process.kill()


def test_an_error_of_any_length_is_kept_without_more_room(tmp_path: Path) -> None:
    progress = Progress()
    progress.open(tmp_path, 1)
    size = progress_path(tmp_path, 1).stat().st_size
    progress.fail("é\n" * 5000, "own")
    assert progress_path(tmp_path, 1).stat().st_size == size
    assert found(tmp_path).failure.startswith("é\né")
    assert found(tmp_path).cause == "own"


def test_what_an_earlier_launch_said_is_forgotten(tmp_path: Path) -> None:
    status_path(tmp_path, 1).parent.mkdir()
    write_status(tmp_path, RankStatus(rank=1, state="failed", pid=os.getpid()))
    Progress().open(tmp_path, 1)
    control_path(tmp_path, STACKS_REQUEST).touch()
    clear_statuses(tmp_path, [1], 2)
    assert not progress_path(tmp_path, 1).exists()
    assert not control_path(tmp_path, STACKS_REQUEST).exists()
    assert not status_path(tmp_path, 1).exists()
