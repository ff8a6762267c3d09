"""Offload does not change training: twenty steps on two ranks with every offload against none."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from helpers.runs import run_plan, run_ranks_of, write_plan

from translution.distributed.checkpoint.manifest import checkpoint_tags
from translution.distributed.runs.folder import CHECKPOINT, METRICS
from translution.distributed.runs.verdict import raise_unless_finished
from translution.planner.common.errors import RunFailedError
from translution.planner.common.machine import usable_cores

pytestmark = pytest.mark.skipif(usable_cores() < 2, reason="needs two cores")

STEPS = 20
WIDE = {"family": "vit", "image": 16, "patch": 4, "channels": 1, "classes": 10, "dim": 112, "depth": 1, "heads": 2}
"""On two ranks, only the tables of this model are large enough for NVMe."""
OFFLOADS: dict[str, dict[str, Any]] = {
    "none": {},
    "cpu-optimizer": {"offload": "cpu-optimizer"},
    "half of the optimizer": {"offload": "cpu-optimizer", "ratio": 0.5},
    "cpu": {"offload": "cpu"},
    "nvme-optimizer": {"offload": "nvme-optimizer"},
    "nvme": {"offload": "nvme"},
    # In addition, fairscale moves the inputs of the blocks to the host.
    "cpu and activations": {"offload": "cpu", "model": WIDE | {"checkpointing": "offload"}},
}


def test_twenty_steps_of_every_offload_have_the_losses_of_no_offload(tmp_path: Path, root: Path) -> None:
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
        # All are fp32; DeepSpeed's CPU Adam rounds differently from torch's, and every step amplifies that.
        assert values == pytest.approx(baseline, rel=2e-3), name
        assert values[:2] == pytest.approx(baseline[:2], rel=1e-5), name
    assert not list(nvme.rglob("*.swp"))


def losses_of(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / METRICS).read_text().splitlines()]
    return [line["loss"] for line in lines if line["event"] in ("step", "evaluation")]


def test_two_runs_on_one_drive_at_once_do_not_disturb_each_other(tmp_path: Path) -> None:
    """Their swap files have the same names."""
    (tmp_path / "drive").mkdir()
    options: dict[str, Any] = {"model": WIDE, "steps": 6, "learning_rate": 3e-3, "tile": 52, "offload": "nvme"}
    seeds = {"alone": 1, "one": 1, "two": 2}
    plans = {
        name: write_plan(tmp_path / name, 1, nvme_path=tmp_path / "drive", seed=seed, **options)
        for name, seed in seeds.items()
    }
    alone = losses_of(run_plan(plans["alone"], 1))
    with ThreadPoolExecutor() as pool:
        one, two = pool.map(lambda name: losses_of(run_plan(plans[name], 1)), ("one", "two"))
    assert one == alone
    assert two != alone
    assert len(two) == len(alone) == 7
    assert not list((tmp_path / "drive").iterdir())


CHANGES = {
    "parameters": "it holds parameters, and bytes 0 to 2609152 differ from what was written",
    "gradients": "it holds gradients, and bytes 0 to ",
    "exp_avg": "it holds exp_avg, and bytes 0 to ",
    "short": "it holds exp_avg_sq, and it has ",
    "checkpoint": "it holds exp_avg, and bytes 0 to ",
}


def checked_plan(tmp_path: Path, ranks: int, zero: dict[str, object] | None = None) -> Path:
    drive = tmp_path / "drive"
    drive.mkdir()
    return write_plan(
        tmp_path / "plan", ranks, model=WIDE, tile=52, offload="nvme", nvme_path=drive, steps=2, zero_overrides=zero
    )


def test_values_that_change_on_the_drive_end_the_run_and_reach_no_checkpoint(tmp_path: Path, root: Path) -> None:
    """A run of which nothing changes, and one that resumes it, whose files DeepSpeed replaces, notice nothing."""
    folder = checked_plan(tmp_path, 1)
    program = root / "tests" / "programs" / "changed_swap.py"
    run_ranks_of([program, folder, "nothing", *CHANGES], 1, tmp_path / "log")
    assert (folder / "nothing" / "result").read_text() == ""
    for case, found in CHANGES.items():
        text = (folder / case / "result").read_text()
        assert text.startswith(f"SwapChangedError: rank 0: swap file {tmp_path}/drive/"), (case, text)
        assert found in text
        assert "resume from the newest checkpoint (translution launch PLAN_FOLDER --resume)" in text
    assert checkpoint_tags(folder / "checkpoint" / CHECKPOINT) == []
    assert checkpoint_tags(folder / "nothing" / CHECKPOINT) == ["step_2"]
    run_ranks_of([program, folder, "nothing"], 1, tmp_path / "log")
    assert (folder / "nothing" / "result").read_text() == ""


def test_a_rank_whose_values_change_on_the_drive_fails_by_name(tmp_path: Path, root: Path) -> None:
    """Its swapper reads and writes ahead; the other rank loses its connection."""
    ahead = {"offload_optimizer.pipeline_read": True, "offload_optimizer.pipeline_write": True}
    folder = checked_plan(tmp_path, 2, ahead | {"offload_optimizer.buffer_count": 12})
    with pytest.raises(AssertionError, match="SwapChangedError"):
        run_ranks_of([root / "tests" / "programs" / "changed_swap.py", folder, "exp_avg"], 2, tmp_path / "log")
    with pytest.raises(
        RunFailedError, match=r"rank 1 failed at step 2, in its update: SwapChangedError: rank 1: swap file .*swp chan"
    ):
        raise_unless_finished(folder / "exp_avg", 2, exit_code=1)
