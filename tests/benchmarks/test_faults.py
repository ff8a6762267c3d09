"""The quick faults of the fault table: each is noticed, told as it is, and leaves nothing."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from translution.planner.common.machine import usable_cores

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.append(str(BENCHMARKS))

from fault_parts import table  # noqa: E402  # The benchmarks are no package of the project.
from fault_parts.trial import Outcome  # noqa: E402

QUICK = [fault for fault in table.FAULTS if fault.quick]
RESUMED = [
    fault
    for fault in QUICK
    if fault.name in ("damaged", "exchanged", "file_deleted", "manifest_cut", "metrics_damaged")
]
needs_two_cores = pytest.mark.skipif(usable_cores() < 2, reason="needs two cores")


@needs_two_cores
@pytest.mark.parametrize("fault", [fault for fault in QUICK if fault not in RESUMED], ids=lambda fault: fault.name)
def test_a_run_with_a_fault_ends_as_the_table_says(fault: Any, tmp_path: Path) -> None:
    if fault.needs_root and os.geteuid() != 0:
        pytest.skip("needs root")
    assert problems(fault, tmp_path) == []


@needs_two_cores
def test_no_damage_of_a_checkpoint_is_resumed(tmp_path: Path) -> None:
    """In one test, because all copy the same interrupted run."""
    assert {fault.name: problems(fault, tmp_path) for fault in RESUMED} == {fault.name: [] for fault in RESUMED}


def problems(fault: Any, folder: Path) -> list[str]:
    """Make a fault; return what is wrong, but for how long it took while other tests run, and the ends of all logs."""
    trial = folder / fault.name
    found = fault.problems(table.run_fault(fault, trial, keep=True))
    found = [problem for problem in found if not problem.startswith("it took")]
    if found:
        found += [f"{path.name}: {path.read_text(errors='replace')[-3000:]}" for path in sorted(trial.rglob("*.log"))]
    shutil.rmtree(trial, ignore_errors=True)
    return found


def test_what_is_wrong_with_an_outcome_is_told() -> None:
    fault = table.Fault("kill", table.processes.stopped, "rank 1 was stopped", lost_steps=2)
    good = Outcome(seconds=5.0, exit_code=1, message="rank 1 was stopped by a signal", lost_steps=2, left=())
    assert fault.problems(good) == []
    bad = Outcome(seconds=70.0, exit_code=0, message="rank 0 failed", lost_steps=3, left=("swap files",))
    assert fault.problems(bad) == [
        "the message is 'rank 0 failed'",
        "the exit code is 0",
        "it took 70 s",
        "3 steps are lost",
        "left: swap files",
    ]


def test_the_table_has_every_kind_of_fault() -> None:
    assert len(table.FAULTS) >= 20
    assert {fault.kind for fault in table.FAULTS} >= {
        "kill", "stop", "full", "slow", "read-only", "corrupted", "exchanged", "deleted", "memory",
    }  # fmt: skip
    names = [fault.name for fault in table.FAULTS]
    assert len(set(names)) == len(names)
    assert len(QUICK) * 2 >= len(names)
    assert len(RESUMED) == 5
