"""One process: a chain of engines, each of another layout, that resumes from the checkpoint of the one before.

DeepSpeed's own getters return the values of each engine. They are compared with those of the engine before at its save,
and again after both have done the same step.

usage: chain.py FOLDER CHAIN...
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from helpers.runs import write_plan
from torch import Tensor

from translution.distributed import leave_process_group
from translution.distributed.checkpoint.manifest import newest_checkpoint
from translution.distributed.checkpoint.reshard import load_resharded
from translution.distributed.checkpoint.save_load import save_checkpoint
from translution.distributed.data.base import Samples
from translution.distributed.data.batching import micro_batches
from translution.distributed.data.loaders import load_samples
from translution.distributed.runs.folder import make_run_folders
from translution.distributed.training.engine import MODEL_DTYPES
from translution.distributed.training.trainer import Trainer
from translution.planner.plans.plan import load_plan

WIDE = {"family": "vit", "image": 16, "patch": 4, "channels": 1, "classes": 10, "dim": 112, "depth": 1, "heads": 2}
"""Large enough for NVMe are only a full table in bf16, and the states of a quarter of a table in pairs."""
Layout = dict[str, Any]
NONE: Layout = {"tile": 30}
NVME: Layout = {"offload": "nvme", "tile": 52}
NVME_OPTIMIZER: Layout = {"offload": "nvme-optimizer", "tile": 13}
CPU: Layout = {"offload": "cpu", "tile": 26}
HALF: Layout = {"offload": "cpu-optimizer", "ratio": 0.5, "tile": 13}
CHAINS: dict[str, tuple[dict[str, Any], list[Layout]]] = {
    "adamw-bf16": (
        {"precision": "bf16"},
        [NONE, NVME, {"stage": 2}, {"stage": 0}, NVME_OPTIMIZER, HALF, {"stage": 1, "tile": 7}, CPU, NVME, NONE],
    ),
    "adamw-fp32": ({}, [NONE, {"stage": 0}, NVME, {"stage": 1}, {"stage": 2, "offload": "cpu-optimizer"}, NONE]),
    "adamw-bf16-sums-fp32": ({"precision": "bf16", "grad_accum_dtype": "fp32"}, [{"stage": 1}, CPU, {"stage": 1}]),
    "adamw-bf16-states": (
        {"precision": "bf16", "bf16_master": True, "bf16_states": True},
        [NONE, CPU, {"stage": 2, "offload": "cpu-optimizer"}, NONE],
    ),
    "lion-bf16": (
        {"precision": "bf16", "optimizer": "lion", "learning_rate": 1e-4},
        [CPU, NVME, {"stage": 2, "offload": "cpu-optimizer"}, NVME_OPTIMIZER, CPU],
    ),
    "adagrad-fp32": ({"optimizer": "adagrad"}, [NONE, CPU, {"stage": 0}, NVME, {"stage": 2}, NONE]),
    "sgd-fp32": ({"optimizer": "sgd"}, [NONE, {"stage": 2}, {"stage": 0}, {"stage": 1}, NONE]),
    "adamw-short": (
        {"precision": "bf16"},
        [NONE, NVME, {"stage": 2}, NVME_OPTIMIZER, {"stage": 0}, HALF, {"stage": 1, "tile": 7}],
    ),
    "sgd-short": ({"optimizer": "sgd"}, [NONE, {"stage": 2, "tile": 7}, {"stage": 0}]),
    "adamw-8bit": ({"adam": "8bit"}, [NONE, {"stage": 2, "tile": 7}, {"stage": 0}, NONE]),
    "sgd-plain-fp32": ({"optimizer": "sgd", "momentum": 0.0}, [NONE, {"stage": 0}, NONE]),
}
NAMES = {
    "adamw": ("exp_avg", "exp_avg_sq"), "lion": ("exp_avg",), "sgd": ("momentum_buffer",), "adagrad": ("second",)
}  # fmt: skip


def holdings(engine: Any, optimizer: str, momentum: float) -> dict[str, Tensor]:
    """All values of an engine by name, in fp32: parameters, master copy, moments and step."""
    from deepspeed import zero
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    inner = getattr(engine.optimizer, "optimizer", engine.optimizer)
    names = NAMES[optimizer] if momentum else ()
    if optimizer == "adagrad":
        names = ("sum",) if type(inner).__name__ == "Adagrad" else ("exp_avg_sq",)
    if hasattr(engine.optimizer, "_lazy_init_hp_params_optimizer_state"):
        engine.optimizer._lazy_init_hp_params_optimizer_state()
    found: dict[str, Tensor] = {}
    masters = getattr(engine.optimizer, "fp32_groups", [list(engine.module.parameters())])[0]
    for number, (name, parameter) in enumerate(engine.module.named_parameters()):
        with zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
            found[f"{name} parameter"] = parameter.detach().float().clone()
        unpartitioned = not hasattr(parameter, "ds_id") and not hasattr(parameter, "_hp_mapping")
        master = masters[number] if unpartitioned else safe_get_full_fp32_param(parameter)
        found[f"{name} master"] = master.detach().float().clone()
        for moment, state in enumerate(names):
            value = inner.state[master][state] if unpartitioned else safe_get_full_optimizer_state(parameter, state)
            found[f"{name} moment {moment}"] = value.detach().float().clone()
    steps = {int(state["step"]) for state in inner.state.values() if "step" in state}
    found["step"] = torch.tensor(sorted(steps))
    return dict(joined(found))


def joined(found: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The same values with the tiles of each table concatenated."""
    tiles: dict[str, dict[int, Tensor]] = {}
    for name, value in found.items():
        match = re.fullmatch(r"(.*_tiles)\.(\d+)\.(.*)", name)
        if match:
            tiles.setdefault(f"{match[1]} {match[3]}", {})[int(match[2])] = value
        else:
            yield name, value.flatten()
    for name, parts in tiles.items():
        yield name, torch.cat([parts[number] for number in sorted(parts)]).flatten()


def largest_difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> dict[str, float]:
    """The largest difference between two engines by kind of value; infinite if their names differ."""
    result: dict[str, float] = {}
    for name in {*one, *other}:
        kind = name.split(" ")[-1]
        kind = kind if kind in ("parameter", "master") else "state"
        same = name in one and name in other and one[name].shape == other[name].shape
        difference = float((one[name] - other[name]).double().norm(torch.inf)) if same and one[name].numel() else 0.0
        result[kind] = max(result.get(kind, 0.0), difference if same else float("inf"))
    return result


def distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """The L2 norm of the difference between the master copies of two engines."""
    parts = [(one[name] - other[name]).double().square().sum() for name in one if name.endswith(" master")]
    return float(torch.stack(parts).sum().sqrt())


class Engines:
    """Engines of one training, on one process."""

    def __init__(self, folder: Path, training: dict[str, Any]) -> None:
        self.folder, self.training, self.number = folder, training, 0
        self.batches: list[list[Samples]] = []

    def start(self, layout: Layout) -> Trainer:
        self.number += 1
        nvme = self.folder / f"nvme-{self.number}"
        nvme.mkdir(parents=True)
        path = nvme if "nvme" in layout.get("offload", "") else None
        options: dict[str, Any] = {"model": WIDE, "steps": 99, "learning_rate": 1e-3} | self.training
        folder = write_plan(self.folder / f"plan-{self.number}", 1, nvme_path=path, **options | layout)
        make_run_folders(folder / "run", folder)
        trainer = Trainer(load_plan(folder), folder / "run")
        trainer.start()
        training = trainer.plan.training
        if not self.batches:
            samples, _ = load_samples(trainer.plan.model, training)
            stream = micro_batches(samples, micro_batch=8, gradient_accumulation_steps=1, rank=0, world_size=1, seed=0)
            self.batches = [next(stream) for _ in range(20)]
        return trainer

    def step(self, trainer: Trainer, number: int) -> float:
        trainer.step = number
        return trainer.train_step(self.batches[number])


def run_chain(folder: Path, name: str) -> list[dict[str, Any]]:
    """Return the results of every pair of consecutive engines of a chain."""
    training, layouts = CHAINS[name]
    engines, results = Engines(folder / name, training), []
    saved_path = folder / name / "checkpoint"
    before = engines.start(layouts[0])
    optimizer, momentum = before.plan.training.optimizer, before.plan.training.momentum
    if before.plan.training.quantizes_states:
        # Moments are quantized again; only the next update shows them.
        momentum = 0.0
    for number in range(2):
        engines.step(before, number)
    for number, layout in enumerate(layouts[1:], start=2):
        save_checkpoint(before.engine.deepspeed_engine, saved_path, number, before.plan)
        held = holdings(before.engine.deepspeed_engine, optimizer, momentum)
        loss = engines.step(before, number)
        moved = holdings(before.engine.deepspeed_engine, optimizer, momentum)
        before.engine.deepspeed_engine.destroy()
        began = time.perf_counter()
        after = engines.start(layout)
        saved = newest_checkpoint(saved_path)
        assert saved is not None
        load_resharded(after.engine.deepspeed_engine, saved, MODEL_DTYPES[after.plan.training.states_dtype])
        loaded = largest_difference(held, holdings(after.engine.deepspeed_engine, optimizer, momentum))
        loss_after = engines.step(after, number)
        moved_after = holdings(after.engine.deepspeed_engine, optimizer, momentum)
        stepped = largest_difference(moved, moved_after)
        results.append({
            "layouts": [layouts[number - 2], layout],
            "loaded": loaded,
            "losses": [loss, loss_after],
            "stepped": stepped,
            "swapped": list((engines.folder / f"nvme-{engines.number}").rglob("exp_avg*.swp")) != [],
            "update": largest_difference(held, moved)["master"],
            "error": distance(moved, moved_after) / distance(held, moved),
            "seconds": time.perf_counter() - began,
        })  # fmt: skip
        before = after
    before.engine.deepspeed_engine.destroy()
    return results


def main(folder: Path, *chains: str) -> None:
    results = {}
    for name in chains or CHAINS:
        results[name] = run_chain(folder, name)
        (folder / "results.json").write_text(json.dumps(results, indent=1))
    leave_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
