"""The recorder on a GPU, with a stand-in for torch's counters."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers.runs import write_plan

from translution.distributed.profiling.recorder import Recorder, StateSnapshot
from translution.distributed.runs.folder import memory_path
from translution.distributed.runs.measurement import read_memory
from translution.planner.common.phases import TRAINING_PHASES, Phase
from translution.planner.plans.plan import load_plan

EMPTY = StateSnapshot(entries={}, host_entries={}, swap_buffers={}, process={"peak": 7}, disk={})


def test_reserved_and_used_bytes_of_a_gpu_are_the_highest_of_a_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    allocated, reserved, free = [100], [0], [1000]
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 100)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: allocated[0])
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: reserved[0])
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free[0], 5000))
    plan = load_plan(write_plan(tmp_path / "plan", 1))
    plan = plan.model_copy(update={"cluster": plan.cluster.model_copy(update={"device": "cuda"})})
    recorder = Recorder(plan, 0)
    # Only the phases of a training step count: init reserves the most here.
    for phase, values in {
        Phase.INIT: (150, 900, 100),
        Phase.FORWARD: (300, 400, 800),
        Phase.BACKWARD: (500, 600, 300),
        Phase.STEP: (200, 600, 400),
    }.items():
        (allocated[0], reserved[0], free[0]) = values
        recorder.record(phase, lambda: None)
    assert set(TRAINING_PHASES) <= {Phase.FORWARD, Phase.BACKWARD, Phase.STEP}
    found = recorder.measurement(2, EMPTY)
    assert found.peak_bytes == 400
    assert (found.reserved_bytes, found.device_used_bytes) == (600, 4700)
    assert found.phase_peak_bytes[Phase.BACKWARD] == 400


def test_a_measurement_of_an_earlier_version_has_none_of_them(tmp_path: Path) -> None:
    path = memory_path(tmp_path, 0)
    path.parent.mkdir(parents=True)
    old = {"rank": 0, "device": "cuda", "step": 2, "entries_bytes": {}, "resident_bytes": 5}
    path.write_text(json.dumps(old | {"phase_peak_bytes": {}, "peak_bytes": 6, "process_peak_bytes": 7}))
    found = read_memory(tmp_path, 0)
    assert found is not None
    assert found.reserved_bytes is found.device_used_bytes is None
