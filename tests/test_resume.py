"""A resumed run is the run that was never interrupted, to the bit, wherever its state lies."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import run_plan, write_plan

from translution.distributed.launch import launch_environment
from translution.distributed.manifest import MANIFEST, tags
from translution.distributed.ops import prepare_ops
from translution.distributed.run_files import CHECKPOINT, CONTINUE, METRICS
from translution.planner.cluster import local_cpu_cluster, usable_cores

pytestmark = pytest.mark.skipif(usable_cores() < 2, reason="needs two cores; the project's CI has them")

WIDE = {"family": "vit", "image": 16, "patch": 4, "channels": 1, "classes": 10, "dim": 192, "depth": 1, "heads": 3}
"""Tiles of 12 of its relations reach NVMe from two ranks, in either precision; what is not a tile does not."""
TINY = WIDE | {"dim": 16, "depth": 2, "heads": 2, "dropout": 0.1}
BF16 = {"precision": "bf16", "model": WIDE, "tile": 30}
CASES: dict[str, dict[str, Any]] = {
    "0": {"stage": 0, "model": TINY},
    "1-bf16": {"stage": 1, "model": TINY, "precision": "bf16"},
    "2-cpu-optimizer": {"stage": 2, "model": TINY, "offload": "cpu-optimizer"},
    "3-dropout-accumulation": {"model": TINY, "accumulation": 2},
    "3-cpu-optimizer": {"offload": "cpu-optimizer", **BF16},
    "3-half-offloaded": {"offload": "cpu-optimizer", "ratio": 0.5, **BF16},
    "3-cpu": {"offload": "cpu", **BF16},
    "3-nvme-optimizer": {"offload": "nvme-optimizer", **BF16},
    "3-nvme": {"offload": "nvme", **BF16},
}
STEPS, SAVED = 5, 3


@pytest.fixture(scope="module", autouse=True)
def compiled_ops(tmp_path_factory: pytest.TempPathFactory) -> None:
    """DeepSpeed's ops, compiled before ranks would race for them."""
    ops = ["ShareMemCommBuilder", "CPUAdamBuilder", "AsyncIOBuilder"]
    prepare_ops(ops, launch_environment(local_cpu_cluster(2)), tmp_path_factory.mktemp("ops") / "log")


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / METRICS).read_text().splitlines()]


def values(run: Path, after: int) -> list[tuple[Any, ...]]:
    """What the steps after one, and the evaluation, computed."""
    kept = ("event", "step", "loss", "grad_norm", "learning_rate", "accuracy")
    lines = [line for line in metrics(run) if line["event"] in ("step", "evaluation") and line["step"] > after]
    return [tuple(line.get(name) for name in kept) for line in lines]


def tensors(value: Any) -> Iterator[torch.Tensor]:
    """Every tensor in what a checkpoint's file holds."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for name in sorted(value, key=str):
            yield from tensors(value[name])
    elif isinstance(value, list | tuple):
        for entry in value:
            yield from tensors(entry)


def assert_same_state(one: Path, other: Path) -> None:
    """Two checkpoints hold the same bits."""
    names = sorted(str(path.relative_to(one)) for path in one.rglob("*") if path.is_file() and path.name != MANIFEST)
    assert names == sorted(
        str(path.relative_to(other)) for path in other.rglob("*") if path.is_file() and path.name != MANIFEST
    )
    compared = 0
    for name in names:
        if name.endswith(".swp"):
            assert (one / name).read_bytes() == (other / name).read_bytes(), name
            compared += 1
        elif name.endswith(".pt"):
            pair = [torch.load(folder / name, weights_only=False, map_location="cpu") for folder in (one, other)]
            for first, second in zip(*map(list, map(tensors, pair)), strict=True):
                # What lies on NVMe has no values here.
                if first.untyped_storage().nbytes() >= first.numel() * first.element_size():
                    assert torch.equal(first, second), name
                    compared += first.numel() > 1
    assert compared


@pytest.mark.parametrize("name", CASES)
def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(name: str, tmp_path: Path) -> None:
    nvme = tmp_path / "nvme" if "nvme" in name else None
    if nvme:
        nvme.mkdir()
    options = {"steps": STEPS, "checkpoint_steps": SAVED, "learning_rate": 3e-3} | CASES[name]
    folder = write_plan(tmp_path / "plan", 2, nvme_path=nvme, **options)
    run = run_plan(folder, 2)
    assert tags(run / CHECKPOINT) == [f"step_{SAVED}", f"step_{STEPS}"]
    if nvme:
        assert list((run / CHECKPOINT / f"step_{SAVED}").rglob("exp_avg_sq-*.swp"))
    shutil.move(run, tmp_path / "uninterrupted")
    shutil.copytree(tmp_path / "uninterrupted", run)
    shutil.rmtree(run / CHECKPOINT / f"step_{STEPS}")
    (run / METRICS).write_text((run / METRICS).read_text()[:-200])  # As a killed run leaves it.
    assert run_plan(folder, 2, CONTINUE) == run
    assert values(run, SAVED)[-3:] == values(tmp_path / "uninterrupted", SAVED)
    last = f"{CHECKPOINT}/step_{STEPS}"
    assert_same_state(run / last, tmp_path / "uninterrupted" / last)
