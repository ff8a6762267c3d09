"""Checkpoints in the layout of DeepSpeed's ZeRO-3, for any number of ranks, with or without swap files."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from translution.distributed.checkpoint.manifest import MANIFEST, CheckpointRef, Manifest
from translution.distributed.runs.folder import CHECKPOINT, make_run_folders
from translution.planner.plans.plan import PLAN_FILE

KINDS = ("master", "exp_avg", "exp_avg_sq")


def shares(values: Tensor, ranks: int) -> list[Tensor]:
    """Return a parameter's values, padded with NaN and split into equal shares."""
    share = -(-values.numel() // ranks)
    padded = torch.full((ranks * share,), float("nan"))
    padded[: values.numel()] = values.flatten()
    return list(padded.split(share))


def write_checkpoint(
    plan_folder: Path,
    tensors: Mapping[str, Mapping[str, Tensor]],
    groups: Sequence[Sequence[str]],
    ranks: int,
    *,
    swapped: bool = False,
    step: int = 7,
) -> Path:
    """Write a run folder with one checkpoint.

    Args:
        plan_folder: folder with the plan of the run.
        tensors: for each of `KINDS`, the values of every parameter by name.
        groups: names of the parameters in each sub-group.
        ranks: number of ranks that saved the checkpoint.
        swapped: write sub-groups as DeepSpeed's NVMe swap files.
        step: step after which the checkpoint was saved.
    """
    run = plan_folder / "runs" / "001"
    make_run_folders(run, plan_folder)
    path = run / CHECKPOINT / f"step_{step}"
    path.mkdir(parents=True)
    (path / PLAN_FILE).write_bytes((plan_folder / PLAN_FILE).read_bytes())
    shapes = [OrderedDict((name, tensors["master"][name].shape) for name in names) for names in groups]
    model: dict[str, Any] = {
        "module": OrderedDict(), "buffer_names": [], "optimizer": None, "param_shapes": shapes,
        "global_steps": step, "global_samples": 16 * step, "skipped_steps": 0,
    }  # fmt: skip
    torch.save(model, path / "zero_pp_rank_0_mp_rank_00_model_states.pt")
    for rank in range(ranks):
        folder = path / "offloaded_tensors" / f"rank{rank:02d}"
        folder.mkdir(parents=True)
        flats: list[Tensor] = []
        states: dict[int, dict[str, Any]] = {}
        for number, names in enumerate(groups):
            states[number] = {"step": step}
            for kind in KINDS:
                flat = torch.cat([shares(tensors[kind][name], ranks)[rank] for name in names])
                if swapped:
                    identity = f"{'' if kind == 'master' else kind + '-'}{9 - number}_{number}"
                    padding = bytes(-flat.numel() * 4 % 1024)
                    (folder / f"{identity}.tensor.swp").write_bytes(flat.numpy().tobytes() + padding)
                    flat = torch.empty(0)
                    flat.ds_id = identity  # type: ignore[attr-defined]  # as DeepSpeed does
                if kind == "master":
                    flats.append(flat)
                else:
                    states[number][kind] = flat
        saved = {"fp32_flat_groups": flats, "optimizer_state_dict": {"state": states}}
        torch.save({"optimizer_state_dict": saved}, path / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    sizes = {str(file.relative_to(path)): file.stat().st_size for file in path.rglob("*") if file.is_file()}
    (path / MANIFEST).write_text(Manifest(step=step, ranks=ranks, files=sizes).model_dump_json())
    return run


def saved_of(run: Path, step: int = 7) -> CheckpointRef:
    """Return the checkpoint that `write_checkpoint` wrote."""
    path = run / CHECKPOINT / f"step_{step}"
    manifest = Manifest.model_validate_json((path / MANIFEST).read_bytes())
    return CheckpointRef(folder=run / CHECKPOINT, tag=path.name, manifest=manifest)
