"""Wherever the states lie, two ranks train alike: twenty steps of every offload against none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers.runs import run_ranks_of, write_plan

from translution.distributed.runs.folder import METRICS
from translution.planner.common.machine import usable_cores

pytestmark = pytest.mark.skipif(usable_cores() < 2, reason="needs two cores; the project's CI has them")

STEPS = 20
WIDE = {"family": "vit", "image": 16, "patch": 4, "channels": 1, "classes": 10, "dim": 112, "depth": 1, "heads": 2}
"""Its tables reach NVMe from two ranks; nothing else does."""
OFFLOADS: dict[str, dict[str, Any]] = {
    "none": {},
    "cpu-optimizer": {"offload": "cpu-optimizer"},
    "half of the optimizer": {"offload": "cpu-optimizer", "ratio": 0.5},
    "cpu": {"offload": "cpu"},
    "nvme-optimizer": {"offload": "nvme-optimizer"},
    "nvme": {"offload": "nvme"},
    # fairscale keeps the blocks' inputs on the host, beside everything else.
    "cpu and activations": {"offload": "cpu", "model": WIDE | {"checkpointing": "offload"}},
}


def test_twenty_steps_of_every_offload_give_the_losses_of_none(tmp_path: Path, root: Path) -> None:
    nvme = tmp_path / "drive"
    nvme.mkdir()
    common: dict[str, Any] = {"steps": STEPS, "learning_rate": 3e-3, "tile": 52, "evaluation_samples": 64}
    folders = []
    for name, options in OFFLOADS.items():
        path = nvme if "nvme" in name else None
        values = {"model": WIDE, "nvme_path": path} | common | options
        folders.append(write_plan(tmp_path / name, 2, **values))
    run_ranks_of([root / "tests" / "programs" / "offloads.py", *folders], 2, tmp_path / "log")
    losses = {}
    for folder in folders:
        lines = [json.loads(line) for line in (folder / "run" / METRICS).read_text().splitlines()]
        losses[folder.name] = [line["loss"] for line in lines if "loss" in line]
        assert len(losses[folder.name]) == STEPS + 1
    baseline = losses.pop("none")
    assert baseline[-1] < 0.95 * baseline[0]
    for name, values in losses.items():
        # fp32 in all; the host's Adam rounds otherwise than torch's, and Adam amplifies that from step to step.
        assert values == pytest.approx(baseline, rel=2e-3), name
        assert values[:2] == pytest.approx(baseline[:2], rel=1e-5), name
    assert not list(nvme.rglob("*.swp"))
