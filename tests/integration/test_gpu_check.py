"""A rehearsal of `scripts/gpu_check.py` on one CPU rank runs every part."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from helpers.waiting import PATIENCE_S
from pydantic import TypeAdapter

from translution.reports.inputs.gpu_record import (
    GPU_RECORD,
    GpuCheck,
    GpuLargest,
    GpuMemory,
    GpuOperators,
    GpuTimes,
    GpuTransfers,
    part_data,
)


def test_a_rehearsal_runs_every_part(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "gpu"
    command = [sys.executable, str(root / "scripts" / "gpu_check.py"), "--device", "cpu", "--small", "--out", str(out)]
    done = subprocess.run(command, env=os.environ, capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 0, done.stdout + done.stderr
    text = (out / GPU_RECORD).read_bytes()
    check = TypeAdapter(GpuCheck).validate_json(text)
    files = {path.name for path in out.iterdir()}
    assert files == {GPU_RECORD, *(f"{part.name}.json" for part in check.parts)}
    assert len(files) <= 8 and sum(path.stat().st_size for path in out.iterdir()) < 2**20
    assert [part.state for part in check.parts] == ["ok"] * 7
    assert all(part.line and f"{part.name}: " in done.stdout for part in check.parts)
    for part in json.loads(text)["parts"]:
        assert json.loads((out / f"{part['name']}.json").read_text()) == part
    _check_findings(check)


def _check_findings(check: GpuCheck) -> None:
    assert (check.device, check.small) == ("cpu", True)
    assert {"torch", "deepspeed", "Python"} <= set(check.made.versions)
    assert "scripts/gpu_check.py --device cpu --small" in check.made.command
    parity: Any = check.part("parity")
    assert parity.data["tests"] == {"passed": parity.data["tests"]["passed"]}
    operators = part_data(check, "operators", GpuOperators)
    assert [len(layer.ways) for layer in operators.results] == [5, 5, 3]  # Of α-Translution fewer are compared.
    assert len(operators.networks) == 8 and all(row.seconds for row in operators.networks)
    for layer in operators.results:
        assert all(not way.error and way.forward_seconds and way.backward_seconds for way in layer.ways)
    memory = part_data(check, "memory", GpuMemory)
    assert [row.what for row in memory.overhead][-1] == "first collective"
    assert not memory.overhead_error
    for row in memory.plans:
        assert row.allocated_bytes and row.predicted_allocated_bytes and row.step_seconds
        # Upper bounds that hardly count in a real model do in a tiny one.
        assert 0.95 <= row.predicted_allocated_bytes / row.allocated_bytes <= 1.5
        assert row.reserved_bytes is row.device_used_bytes is None
    times = part_data(check, "times", GpuTimes)
    assert [row.name for row in times.plans] == [row.name for row in memory.plans]
    assert all(row.catalog and row.calibrated and row.step_seconds for row in times.plans)
    (largest,) = part_data(check, "largest", GpuLargest).runs
    assert (largest.depth, largest.steps, largest.error) == (2, 20, "")
    assert largest.first_loss and largest.last_loss and largest.last_loss < largest.first_loss
    rates = {row.what: row for row in part_data(check, "transfers", GpuTransfers).rates}
    assert all(row.per_second for row in rates.values()), rates
    assert {"CPU Adam", "torch fused AdamW", "host to device, pageable", "drive read, plain files"} <= set(rates)
