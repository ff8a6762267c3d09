"""A rank that stands still is noticed and named, and one that goes on is not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.runs import write_plan
from helpers.waiting import wait_until

from translution.distributed.runs.progress import RankProgress, progress_path
from translution.distributed.runs.rank_watch import (
    HangLimits,
    RankWatch,
    hang_limits,
    limits_of_environment,
)
from translution.distributed.runs.watchdog import process_state
from translution.planner.common.errors import InputError
from translution.planner.plans.plan import Plan, load_plan

HOST = os.uname().nodename
LIMITS = HangLimits(step_s=100.0, slow_s=300.0)


class Ranks:
    """The progress of some ranks, and a watch whose seconds pass when the test says so."""

    def __init__(self, run: Path, count: int = 2, limits: HangLimits | None = LIMITS) -> None:
        self.run, self.now = run, 0.0
        (run / "control").mkdir(parents=True, exist_ok=True)
        self.ranks = {
            rank: RankProgress(rank=rank, pid=os.getpid(), host=HOST, step=5, steps_begun=5, phase="forward", moves=40)
            for rank in range(count)
        }
        for rank in self.ranks:
            self.change(rank)
        self.watch = RankWatch(run, range(count), count, limits, clock=lambda: self.now)
        self.watch.look()

    def change(self, rank: int, **values: Any) -> None:
        """Let a rank write its progress."""
        self.ranks[rank] = self.ranks[rank].model_copy(update=values)
        progress_path(self.run, rank).write_text(self.ranks[rank].model_dump_json())

    def heartbeat(self, *ranks: int, **values: Any) -> None:
        for rank in ranks:
            self.change(rank, heartbeat=self.ranks[rank].heartbeat + 1, **values)

    def pass_seconds(self, seconds: float, *reporting: int) -> str:
        """Let seconds pass, one after the other; return the first hang that is found."""
        for _ in range(round(seconds)):
            self.now += 1.0
            self.heartbeat(*reporting)
            if text := self.watch.find_hang():
                return text
        return ""


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    yield process
    process.kill()
    process.wait()


def test_the_rank_that_is_behind_is_named_and_where_it_is(tmp_path: Path) -> None:
    ranks = Ranks(tmp_path)
    ranks.change(1, phase="backward", moves=41)
    assert ranks.pass_seconds(99, 0, 1) == ""
    text = ranks.pass_seconds(2, 0, 1)
    assert text == f"rank 0 on {HOST} has done nothing for 100 s, at step 5, in forward; the others wait for it"


def test_ranks_that_all_wait_in_one_place_are_named_together(tmp_path: Path) -> None:
    assert (
        Ranks(tmp_path).pass_seconds(101, 0, 1)
        == "no rank goes on: each has done nothing for 100 s, at step 5, in forward"
    )


def test_a_rank_that_moves_is_left_alone(tmp_path: Path) -> None:
    ranks = Ranks(tmp_path)
    for moves in range(41, 50):
        assert ranks.pass_seconds(90, 0, 1) == ""
        ranks.change(0, moves=moves)
        ranks.change(1, moves=moves)


@pytest.mark.parametrize("slow", [{"phase": "checkpoint save"}, {"phase": "init"}, {"steps_begun": 1}])
def test_slow_phases_and_the_first_step_have_more_time(tmp_path: Path, slow: dict[str, Any]) -> None:
    ranks = Ranks(tmp_path)
    for rank in (0, 1):
        ranks.change(rank, **slow)
    assert ranks.pass_seconds(299, 0, 1) == ""
    assert "has done nothing for 300 s" in ranks.pass_seconds(2, 0, 1)


def test_a_stopped_process_is_noticed_sooner(tmp_path: Path, sleeper: subprocess.Popen[bytes]) -> None:
    ranks = Ranks(tmp_path)
    ranks.change(1, pid=sleeper.pid)
    ranks.pass_seconds(1)
    sleeper.send_signal(signal.SIGSTOP)
    wait_until(lambda: process_state(sleeper.pid).stopped)
    assert ranks.pass_seconds(29, 0) == ""
    assert ranks.pass_seconds(2, 0) == "rank 1 was stopped by a signal 30 s ago, at step 5, in forward"
    sleeper.send_signal(signal.SIGCONT)
    wait_until(lambda: not process_state(sleeper.pid).stopped)
    assert ranks.pass_seconds(29, 0) == ""


def test_only_a_rank_on_another_host_may_not_be_silent(tmp_path: Path) -> None:
    here, there = Ranks(tmp_path / "here"), Ranks(tmp_path / "there")
    assert here.pass_seconds(61, 0) == ""
    there.change(1, host="node7")
    text = there.pass_seconds(61, 0)
    assert text == "rank 1 on node7 has given no sign of life for 60 s, at step 5, in forward"
    assert Ranks(tmp_path / "reporting").pass_seconds(61, 0, 1) == ""


def test_a_rank_that_has_ended_or_failed_does_not_hang(tmp_path: Path) -> None:
    ranks = Ranks(tmp_path)
    ranks.change(0, phase="end")
    ranks.change(1, failure="OSError", cause="own")
    assert ranks.pass_seconds(500) == ""


def test_the_time_in_which_the_watching_process_was_stopped_does_not_count(tmp_path: Path) -> None:
    ranks = Ranks(tmp_path)
    ranks.now += 5000
    assert ranks.watch.find_hang() == ""
    assert ranks.pass_seconds(94, 0, 1) == ""
    assert ranks.pass_seconds(2, 0, 1) != ""


def test_without_limits_nothing_hangs(tmp_path: Path) -> None:
    assert Ranks(tmp_path, limits=None).pass_seconds(5000) == ""


def test_the_signal_that_killed_a_rank_is_seen_once(tmp_path: Path, sleeper: subprocess.Popen[bytes]) -> None:
    ranks = Ranks(tmp_path)
    ranks.change(1, pid=sleeper.pid)
    watch = RankWatch(tmp_path, range(3), 3, None)
    watch.look()
    assert watch.deaths == []
    ranks.change(1, step=6, phase="backward")
    sleeper.kill()
    wait_until(lambda: not process_state(sleeper.pid).alive)
    watch.look()
    watch.look()
    (death,) = watch.deaths
    assert (death.rank, death.signal, death.last.place) == (1, signal.SIGKILL, "at step 6, in backward")


def test_what_a_run_waits_for_begins_with_the_last_rank(tmp_path: Path) -> None:
    ranks = Ranks(tmp_path, count=3)
    before = ranks.watch.count_moves()
    ranks.change(0, moves=42, phase="optimizer step")
    ranks.change(2, moves=41, phase="backward")
    assert ranks.watch.count_moves() == before + 3
    assert ranks.watch.describe() == (
        "rank 1 at step 5, in forward; rank 2 at step 5, in backward; rank 0 at step 5, in its update"
    )


def test_limits_follow_the_predicted_time(tmp_path: Path) -> None:
    plan = load_plan(write_plan(tmp_path / "plan", 2))
    usual = hang_limits(plan, None)
    assert usual is not None
    assert usual.step_s >= 600
    assert usual.slow_s > 1800
    assert plan.time is not None
    slow = plan.model_copy(update={"time": plan.time.model_copy(update={"high_s": 500.0})})
    assert hang_limits(slow, None) == HangLimits(step_s=10_000.0, slow_s=10_000.0 + usual.slow_s - 1800)


def test_limits_of_the_user(plan: Plan) -> None:
    assert hang_limits(plan, 10) == HangLimits(step_s=600.0, slow_s=1800.0)
    assert hang_limits(plan, 0.1) == HangLimits(step_s=6.0, slow_s=120.0)
    assert hang_limits(plan, 0) is None
    for value in (-1, float("nan"), float("inf")):
        with pytest.raises(InputError, match=r"hang_minutes: .* is not allowed: must be at least 0"):
            hang_limits(plan, value)


def test_limits_of_ranks_without_a_launcher(plan: Plan) -> None:
    assert limits_of_environment(plan, {"TRANSLUTION_HANG_MINUTES": "2"}) == hang_limits(plan, 2)
    assert limits_of_environment(plan, {"TRANSLUTION_HANG_MINUTES": ""}) == hang_limits(plan, None)
    assert limits_of_environment(plan, {"TRANSLUTION_HANG_MINUTES": "0"}) is None
    with pytest.raises(InputError, match="TRANSLUTION_HANG_MINUTES: 'soon' is not allowed"):
        limits_of_environment(plan, {"TRANSLUTION_HANG_MINUTES": "soon"})


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    return load_plan(write_plan(tmp_path_factory.mktemp("plans") / "plan", 2))


def test_a_stopped_rank_is_named_rather_than_those_that_wait_for_it(
    tmp_path: Path, sleeper: subprocess.Popen[bytes]
) -> None:
    ranks = Ranks(tmp_path, limits=HangLimits(step_s=6.0, slow_s=6.0))
    ranks.change(1, pid=sleeper.pid)
    ranks.pass_seconds(1, 0)
    sleeper.send_signal(signal.SIGSTOP)
    wait_until(lambda: process_state(sleeper.pid).stopped)
    # Both have the same limit, and rank 0 has stood still for longer.
    ranks.now += 5.0
    ranks.heartbeat(0)
    assert ranks.pass_seconds(2, 0).startswith("rank 1 was stopped by a signal 5 s ago")
    assert ranks.watch.hung is not None
    assert ranks.watch.hung.rank == 1
