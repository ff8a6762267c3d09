"""The rank that is the cause is named, not one that only noticed it."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest

from translution.distributed.runs import verdict
from translution.distributed.runs.folder import LOG
from translution.distributed.runs.memory_kills import count_memory_kills
from translution.distributed.runs.progress import RankProgress, progress_path
from translution.distributed.runs.rank_watch import Death
from translution.distributed.runs.status import ANOTHER_RANK, RankStatus, write_status
from translution.distributed.runs.verdict import raise_unless_finished
from translution.planner.common.errors import RunFailedError

BROKEN = "RuntimeError: [../third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    for name in ("control", "status", "logs"):
        (tmp_path / name).mkdir()
    (tmp_path / LOG).write_text("")
    return tmp_path


def place(run: Path, rank: int, **values: Any) -> RankProgress:
    """Let a rank be in the backward pass of step 9."""
    usual = {"pid": 1, "host": "node1", "step": 9, "steps_begun": 9, "phase": "backward", "moves": 20 - rank}
    found = RankProgress.model_validate({"rank": rank, **usual, **values})
    progress_path(run, rank).write_text(found.model_dump_json())
    return found


def report(run: Path, rank: int, state: str, message: str = "", step: int = 5) -> None:
    write_status(run, RankStatus.model_validate({"rank": rank, "state": state, "step": step, "message": message}))


def fail(run: Path, rank: int, message: str, cause: str) -> None:
    place(run, rank, failure=message, cause=cause)
    report(run, rank, "failed", message)


def said(run: Path, count: int = 2, **known: Any) -> str:
    with pytest.raises(RunFailedError) as found:
        raise_unless_finished(run, count, 1, **known)
    return str(found.value)


def test_a_ranks_own_error_comes_before_lost_connections(run: Path) -> None:
    fail(run, 0, BROKEN, "connection")
    fail(run, 1, "OSError: No space left on device: /data/x", "own")
    assert said(run).startswith(
        "rank 1 failed at step 9, in backward: OSError: No space left on device: /data/x (log: "
    )


def test_a_killed_process_comes_before_those_that_lost_their_connection(run: Path) -> None:
    deaths = [Death(0, None, place(run, 0)), Death(1, signal.SIGKILL, place(run, 1))]
    fail(run, 0, BROKEN, "connection")
    report(run, 1, "training")
    expected = "rank 1 was killed by SIGKILL at step 9, in backward (log: "
    assert said(run, deaths=deaths).startswith(expected)
    assert said(run, deaths=deaths[::-1]).startswith(expected)


def test_processes_that_the_launcher_ended_are_not_the_cause(run: Path) -> None:
    fail(run, 0, BROKEN, "connection")
    report(run, 1, "training")
    deaths = [
        Death(0, None, place(run, 0, failure=BROKEN, cause="connection")),
        Death(1, signal.SIGTERM, place(run, 1)),
    ]
    assert said(run, deaths=deaths).startswith("rank 0 lost its connection at step 9, in backward: RuntimeError")


def test_an_error_that_no_status_could_hold_is_read_from_the_progress(run: Path) -> None:
    report(run, 0, "training")
    place(run, 0, failure="OSError: No space left on device", cause="own")
    fail(run, 1, BROKEN, "connection")
    assert said(run).startswith("rank 0 failed at step 9, in backward: OSError: No space left on device")


def test_a_hang_is_told_in_its_own_words(run: Path) -> None:
    fail(run, 0, "rank 1 on node7 has done nothing for 600 s, at step 9, in backward", "other")
    report(run, 1, "training")
    place(run, 1)
    assert said(run) == f"rank 1 on node7 has done nothing for 600 s, at step 9, in backward (stacks: {run / 'logs'})"


def test_the_kernels_killing_for_memory_is_told(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report(run, 0, "training")
    deaths = [Death(0, signal.SIGKILL, place(run, 0))]
    monkeypatch.setattr(verdict, "count_memory_kills", lambda: 4)
    assert "for want of memory" not in said(run, 1, deaths=deaths, memory_kills=4)
    assert "for want of memory" not in said(run, 1, deaths=deaths, memory_kills=None)
    assert (
        "SIGKILL at step 9, in backward, probably by the kernel, which has killed a process for want of memory"
        in said(run, 1, deaths=deaths, memory_kills=3)
    )


def test_a_full_shared_memory_is_told(run: Path) -> None:
    report(run, 0, "training")
    assert "SIGBUS at step 9, in backward, as processes are when /dev/shm" in said(
        run, 1, deaths=[Death(0, signal.SIGBUS, place(run, 0))]
    )


def test_a_kill_on_another_host_is_read_from_the_log_of_this_launch(run: Path) -> None:
    old = "node1: [ERROR] ['python', 'rank'] exits with return code = -11\n"
    new = "node2: [2026-11-28 10:00:00,0] [ERROR] [launch.py:325:sigkill_handler] [...] exits with return code = -9\n"
    (run / LOG).write_text(old + new)
    fail(run, 0, BROKEN, "connection")
    report(run, 1, "training")
    place(run, 1, host="node2")
    assert said(run, log_offset=len(old)).startswith("rank 1 on node2 was killed by SIGKILL at step 9, in backward")


def test_a_signal_that_was_missed_is_read_from_the_log(run: Path) -> None:
    (run / LOG).write_text("[ERROR] [launch.py] ['python'] exits with return code = -11\n")
    report(run, 0, "training")
    assert said(run, 1, deaths=[Death(0, None, place(run, 0))]).startswith("rank 0 was killed by SIGSEGV at step 9")
    (run / LOG).write_text("")
    assert said(run, 1, deaths=[Death(0, None, place(run, 0))]).startswith("rank 0 ended without a word at step 9")


def test_without_a_cause_each_unfinished_rank_is_where_it_was_last(run: Path) -> None:
    report(run, 0, "training")
    place(run, 0)
    report(run, 1, "finished")
    assert said(run, 3).startswith(
        "rank 0 was last seen training at step 9, in backward; rank 2 never started; launcher"
    )


def test_kills_for_memory_are_counted_in_the_control_group_or_the_machine(tmp_path: Path) -> None:
    proc, cgroups = tmp_path / "proc", tmp_path / "cgroup"
    (proc / "self").mkdir(parents=True)
    assert count_memory_kills(proc, cgroups) is None
    (proc / "vmstat").write_text("nr_free_pages 1\noom_kill 2\n")
    assert count_memory_kills(proc, cgroups) == 2
    (proc / "self" / "cgroup").write_text("12:pids:/x\n0::/job\n")
    (cgroups / "job").mkdir(parents=True)
    (cgroups / "job" / "memory.events").write_text("low 0\noom 7\noom_kill 5\noom_group_kill 0\n")
    assert count_memory_kills(proc, cgroups) == 5


def test_the_rank_that_was_asked_to_end_says_by_what(run: Path) -> None:
    report(run, 0, "stopped", ANOTHER_RANK, step=7)
    report(run, 1, "stopped", "SIGTERM", step=7)
    assert said(run).startswith("stopped by SIGTERM; saved at step 7: resume it with")


def test_a_hang_comes_before_the_connections_that_it_broke(run: Path) -> None:
    fail(run, 0, BROKEN, "connection")
    fail(run, 1, "rank 2 on node7 has given no sign of life for 60 s, at step 9, in backward", "other")
    assert said(run).startswith("rank 2 on node7 has given no sign of life for 60 s, at step 9, in backward (stacks: ")
