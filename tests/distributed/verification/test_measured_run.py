"""A measured run: how often the ranks run, and what is told about it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers.runs import write_plan

from translution.distributed.launcher.launcher import LaunchResult
from translution.distributed.runs.mode import RunMode
from translution.distributed.verification import measured_run
from translution.planner.plans.plan import load_plan


@pytest.mark.parametrize("resume", [True, False])
def test_progress_counts_the_runs_of_the_ranks(resume: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = load_plan(write_plan(tmp_path / "plan", 1))
    modes: list[RunMode] = []
    told: list[object] = []

    def run_ranks(*_: object, mode: RunMode, **__: Any) -> LaunchResult:
        modes.append(mode)
        return LaunchResult(tmp_path / "run", (), {})

    monkeypatch.setattr(measured_run, "launch", run_ranks)
    monkeypatch.setattr(measured_run, "start_ranks", run_ranks)
    run = measured_run.measure_plan(
        plan, tmp_path / "out", told.append, resume=resume, on_progress=lambda done, total: told.append((done, total))
    )
    assert run == tmp_path / "run"
    again = [RunMode.MEASURE_RESUME, RunMode.MEASURE_PROCESS, RunMode.MEASURE_RESUME_PROCESS] if resume else []
    assert modes == [RunMode.MEASURE, *again]
    assert [one for one in told if isinstance(one, tuple)] == [(n, len(modes)) for n in range(1, len(modes) + 1)]
    assert len([one for one in told if isinstance(one, str)]) == len(again)
