"""Saves checkpoints atomically and loads them; a resumed run is bitwise identical.

    checkpoint/step_N/              the files of DeepSpeed 0.19.8, one set per rank
    checkpoint/step_N/plan.json     the plan with which it was saved: ranks, stage, offload, tiles
    checkpoint/step_N/device/       moments of sub-groups that a partial offload leaves on the device
    checkpoint/step_N/manifest.json the step, the ranks, the size of every file, the evaluation; written last
    checkpoint/latest               the name of the newest checkpoint, for DeepSpeed's own tools

A checkpoint is saved under a hidden name and renamed when every rank has finished. All nodes must see the folder.

DeepSpeed does not save the moments of sub-groups on the device under partial offload, and does not load the moments of
an optimizer on NVMe. This module saves and loads them itself.

Sources: DeepSpeed 0.19.8, runtime/engine.py (save_checkpoint, load_checkpoint) and runtime/zero/stage3.py
(_rigid_state_dict, reset_swap_buffers).
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from translution.planner.common import TranslutionError, flush_folder, write_text
from translution.planner.plans import PLAN_FILE, Plan, dump_plan

from .integrity import collect_records, record_own_files
from .manifest import MANIFEST, EvaluationResult, Manifest, best_tag, checkpoint_tags, write_manifest
from .reader import DEVICE_FOLDER

LATEST = "latest"
"""File with the name of the newest checkpoint."""


class CheckpointError(TranslutionError):
    """A checkpoint could not be written."""


def save_checkpoint(
    engine: Any,
    folder: Path,
    step: int,
    plan: Plan,
    *,
    tag: str | None = None,
    evaluation: EvaluationResult | None = None,
    data: str | None = None,
) -> None:
    """Save a checkpoint atomically. Collective: every rank must call it.

    Args:
        engine: DeepSpeed's engine.
        folder: the run's checkpoint folder.
        step: number of optimizer steps done.
        plan: the engine's plan; gives the number of checkpoints to keep.
        tag: name of the checkpoint; ``step_N`` by default, and only such names are checkpoints of the run.
        evaluation: result of the evaluation after this step, if there was one.
        data: fingerprint of the training data.

    Raises:
        CheckpointError: if it cannot be written, for instance because the disk is full; earlier checkpoints stay.
    """
    tag = tag or f"step_{step}"
    rank, partial = engine.global_rank, f".{tag}.partial"
    if (folder / tag / MANIFEST).is_file():
        return  # A resumed run that did no further step.
    torch.distributed.barrier()
    try:
        if rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
            for path in (*folder.glob(".*.partial"), folder / tag):
                shutil.rmtree(path, ignore_errors=True)
        engine.save_checkpoint(str(folder), tag=partial, save_latest=False)
        _save_device_moments(engine, folder / partial)
        # DeepSpeed has all ranks wait for one another, so that every file is complete.
        record_own_files(folder / partial, rank, torch.distributed.get_world_size(), plan.parallel.relation)
        torch.distributed.barrier()
        if rank == 0:
            write_text(folder / partial / PLAN_FILE, dump_plan(plan))
            records = collect_records(folder / partial)
            manifest = Manifest(
                step=step,
                ranks=torch.distributed.get_world_size(),
                files={name: record.size_bytes for name, record in records.items()},
                checksums={name: record.crc32 for name, record in records.items()},
                saved_unix_s=time.time(),
                data=data,
                evaluation=evaluation,
            )
            _complete(folder, partial, tag, manifest)
            prune(folder, plan)
    except (OSError, RuntimeError, TranslutionError) as error:
        text = " ".join(str(error).split())[:200]
        complete = checkpoint_tags(folder)
        earlier = f"{complete[-1]} stays" if complete else "there is none before it"
        # Free the space of the partial checkpoint on a full disk.
        shutil.rmtree(folder / partial, ignore_errors=True)
        raise CheckpointError(f"checkpoint of step {step} could not be written: {text}; {earlier}") from error
    torch.distributed.barrier()


def _complete(folder: Path, partial: str, tag: str, manifest: Manifest) -> None:
    """Write the manifest, and rename the partial checkpoint; all of it durably, and in this order."""
    write_manifest(folder / partial, manifest)
    flush_folder(folder / partial)
    (folder / partial).rename(folder / tag)
    flush_folder(folder)
    write_text(folder / LATEST, tag, durable=True)


def prune(folder: Path, plan: Plan) -> None:
    """Remove the checkpoints of a run that its plan does not keep."""
    best = best_tag(folder) if plan.training.keep_best else None
    for tag in checkpoint_tags(folder)[: -plan.training.keep_checkpoints]:
        if tag == best:
            continue
        # Remove the manifest first: if the rest is interrupted, no incomplete checkpoint counts.
        (folder / tag / MANIFEST).unlink()
        shutil.rmtree(folder / tag, ignore_errors=True)


def _device_groups(engine: Any) -> list[Any]:
    """Vectors of the sub-groups whose states a partial offload leaves on the device."""
    backup = getattr(engine.optimizer, "backup_optimizer", None)
    if backup is None:
        return []
    return [flat for flat in engine.optimizer.fp32_partitioned_groups_flat if flat in backup.state]


def _device_path(folder: Path, rank: int) -> Path:
    return folder / DEVICE_FOLDER / f"rank_{rank}.pt"


def _save_device_moments(engine: Any, folder: Path) -> None:
    flats = engine.optimizer.fp32_partitioned_groups_flat if _device_groups(engine) else []
    states = {
        number: dict(engine.optimizer.backup_optimizer.state[flat])
        for number, flat in enumerate(flats)
        if flat in engine.optimizer.backup_optimizer.state
    }
    if states:
        path = _device_path(folder, engine.global_rank)
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(states, path)


def _load_device_moments(engine: Any, folder: Path) -> None:
    path = _device_path(folder, engine.global_rank)
    if not path.is_file():
        return
    optimizer = engine.optimizer
    for number, state in torch.load(path, map_location="cpu", weights_only=True).items():
        flat = optimizer.fp32_partitioned_groups_flat[number]
        # torch stores the step on the host and the moments on the device of the parameters.
        optimizer.backup_optimizer.state[flat] = {
            name: value if name == "step" else value.to(flat.device) for name, value in state.items()
        }


def load_checkpoint(engine: Any, folder: Path, tag: str) -> None:
    """Load a checkpoint of the same layout into a new engine; called on every rank.

    Args:
        engine: DeepSpeed's engine.
        folder: the run's checkpoint folder.
        tag: name of the checkpoint.
    """
    engine.load_checkpoint(str(folder), tag=tag)
    if getattr(engine.optimizer, "swap_optimizer", False):
        _load_swapped_moments(engine, folder, tag)
    _load_device_moments(engine, folder / tag)
    replay_bias_correction(engine)


def replay_bias_correction(engine: Any) -> None:
    """Give DeepSpeed's CPU Adam the powers of its betas that it had when the checkpoint was saved.

    It multiplies them by the betas in every step, and no checkpoint holds them. A new process would compute them anew
    with ``pow``, which rounds differently, and the resumed run would differ in the last bit. Updates of a single value
    repeat the products.

    Source: DeepSpeed 0.19.8, csrc/includes/cpu_adam.h, Adam_Optimizer::IncrementStep.
    """
    outer = getattr(engine, "optimizer", None)
    adam: Any = getattr(outer, "optimizer", outer)
    if not hasattr(adam, "ds_opt_adam"):
        return
    steps = max((int(state.get("step", 0)) for state in adam.state.values()), default=0)
    value, gradient, first, second = (torch.zeros(1) for _ in range(4))
    group = adam.param_groups[0]
    settings = (*group["betas"], group["eps"], group["weight_decay"], group["bias_correction"])
    for step in range(1, steps + 1):
        adam.ds_opt_adam.adam_update(adam.opt_id, step, 0.0, *settings, value, gradient, first, second)


def _load_swapped_moments(engine: Any, folder: Path, tag: str) -> None:
    """Load the moments of an optimizer on NVMe, and the master copy and states of sub-groups too small for NVMe."""
    from deepspeed.runtime.engine import dp_index_to_str

    optimizer = engine.optimizer
    path = engine._get_zero_ckpt_name(str(folder), tag)
    # Memory-mapped: only the tensors that stay on the host are read.
    saved = torch.load(path, map_location="cpu", weights_only=False, mmap=True)["optimizer_state_dict"]
    states: Mapping[int, dict[str, Any]] = saved["optimizer_state_dict"]["state"]
    swapped = folder / tag / "offloaded_tensors" / ("rank" + dp_index_to_str(engine.global_rank))
    for number, flat in enumerate(optimizer.fp32_partitioned_groups_flat):
        state = states[number]
        if optimizer._swappable_optimizer_subgroup(number):
            count = optimizer.fp16_partitioned_groups_flat_numel[number]
            optimizer._optimizer_states_and_gradient_swap_in(number)
            optimizer.optimizer.state[flat] = {
                name: _read_swapped(swapped / f"{name}-{flat.ds_id}.tensor.swp", count) if torch.is_tensor(value)
                and name != "step" else value
                for name, value in state.items()
            }  # fmt: skip
            optimizer._optimizer_states_and_gradient_swap_out(number)
        else:
            flat.data.copy_(saved["fp32_flat_groups"][number])
            optimizer.optimizer.state[flat] = {
                name: value.clone() if torch.is_tensor(value) else value for name, value in state.items()
            }
            optimizer._reassign_or_swap_out_partitioned_parameters(number)
    # Parameters gathered before the load are stale; this gathers them again.
    optimizer.checkpoint_event_prologue()
    optimizer.checkpoint_event_epilogue()


def _read_swapped(path: Path, count: int) -> torch.Tensor:
    """Read a sub-group's fp32 values from a swap file, without the padding at its end."""
    return torch.from_numpy(np.fromfile(path, dtype=np.float32, count=count))
