"""The ``translution plan`` command that reproduces a plan, if flags alone can express it."""

from __future__ import annotations

import shlex
from typing import Any

from translution.planner.common import InputError
from translution.planner.config import ModelSpec, RunConfig, TrainingSpec, override, preset
from translution.planner.hardware import named_cluster
from translution.planner.plans import Plan


def _model_flags(model: ModelSpec) -> dict[str, object]:
    """Return the flags that make the model from the preset of its name.

    Raises:
        InputError: if no flags make it from a preset.
    """
    fields: dict[str, Any] = {"operator": model.operator, "roles": model.roles}
    if model.operator == "alpha":
        fields |= {"c1": model.c1, "c2": model.c2}
    known = preset(model.name)
    changed = {name: value for name, value in fields.items() if getattr(known, name) != value}
    if override(known, checkpointing=model.checkpointing, **changed) != model:
        raise InputError(f"{model.name}: is not the preset of that name")
    return changed


def plan_command(plan: Plan) -> str | None:
    """Return the command that makes the plan again; None if it would also need files, other settings or an NVMe drive.

    The command fixes what the search chose, except for the ZeRO settings, which are searched again.
    """
    training, zero, cluster = plan.training, plan.zero, plan.cluster
    chosen = {
        "precision": training.precision,
        "data": training.data,
        "micro_batch": training.micro_batch,
        "accumulation": training.gradient_accumulation_steps,
        "steps": training.steps,
    }

    param_device, optimizer = zero.offload_param.device, zero.offload_optimizer
    # What auto stands for in this plan.
    planned = RunConfig(plan.model, cluster, TrainingSpec.model_validate(chosen), zero).training
    if "nvme" in (param_device, optimizer.device) or planned != training:
        return None
    try:
        flags = _model_flags(plan.model)
        if named_cluster(cluster.name) != cluster:
            return None
    except InputError:
        return None
    offload = (
        param_device
        if param_device != "none"
        else {"none": "none"}.get(optimizer.device, f"{optimizer.device}-optimizer")
    )
    flags |= {"cluster": cluster.name} | chosen | {"stage": zero.stage, "offload": offload}
    if zero.uses_fsdp2:
        flags["engine"] = zero.engine
    flags["checkpointing"] = plan.model.checkpointing
    if optimizer.ratio < 1:
        flags["offload_ratio"] = optimizer.ratio
    if plan.parallel.relation > 1:
        flags["relation_parallel"] = plan.parallel.relation
    if zero.stage == 3 and plan.tile_relations is not None:
        flags["tile_relations"] = plan.tile_relations
    words = [text for name, value in flags.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    return shlex.join(["translution", "plan", plan.model.name, *words, "--all-nodes", "--out", "PLAN"])
