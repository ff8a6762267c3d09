"""``translution plan``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pydantic import TypeAdapter

from translution.planner.cluster import load_cluster
from translution.planner.deepspeed_config import remarks
from translution.planner.model_spec import ModelSpec
from translution.planner.parameters import count_parameters
from translution.planner.plan import Plan, make_plan
from translution.planner.plan_folder import write_plan_folder
from translution.planner.schema import validate
from translution.planner.training import TrainingSpec
from translution.planner.units import format_count

from .ledger import phase_table, worst_moments
from .output import console, print_json

_TRAINING: TypeAdapter[TrainingSpec] = TypeAdapter(TrainingSpec)


def plan_from(
    spec: ModelSpec,
    cluster_name: str,
    training: Mapping[str, object],
    *,
    stage: Literal[0, 1, 2, 3],
    tile_relations: int | None,
    offload: str,
    nvme_path: str | None,
    offload_ratio: float,
    knobs: Mapping[str, object],
) -> Plan:
    """Make a plan of what the user wrote.

    Args:
        spec: the model.
        cluster_name: as the user wrote it.
        training: fields of `TrainingSpec`.
        stage: the ZeRO stage.
        tile_relations: relations per tile; None chooses.
        offload: what leaves the device, and for where.
        nvme_path: a folder on every node's NVMe drive.
        offload_ratio: share of the optimizer's sub-groups that leave the device.
        knobs: fields of `ZeroSpec` to set otherwise than chosen.
    """
    return make_plan(
        spec,
        load_cluster(cluster_name),
        validate(_TRAINING, dict(training), "plan", tuple(TrainingSpec.model_fields)),
        stage=stage,
        tile_relations=tile_relations,
        offload=offload,
        nvme_path=nvme_path,
        offload_ratio=offload_ratio,
        knobs=knobs,
    )


def run_plan(plan: Plan, out: Path, *, force: bool, as_json: bool) -> None:
    """Write a plan's folder and print what it predicts.

    Args:
        plan: what to write.
        out: folder to write.
        force: replace an existing plan folder.
        as_json: print the plan as JSON instead of tables.
    """
    write_plan_folder(plan, out, force=force)
    if as_json:
        print_json({"folder": str(out), "plan": plan.model_dump(mode="json")})
        return
    out_console = console()
    ranks = plan.cluster.ranks
    tiles = "" if plan.tile_relations is None else f", {plan.tile_relations} relations per tile"
    parameters = format_count(count_parameters(plan.model).total)
    out_console.print(
        f"{plan.model.name}: {parameters} parameters, ZeRO-{plan.zero.stage} on {ranks} ranks "
        f"({plan.cluster.name}){tiles}, {plan.training.global_batch(ranks)} samples per step"
    )
    out_console.print(phase_table("Predicted memory of each rank, at the worst moment of each phase", plan.prediction))
    for worst in worst_moments(plan.prediction):
        out_console.print(worst)
    for remark in remarks(plan.training, plan.zero):
        out_console.print(f"note: {remark}")
    out_console.print(f"wrote {out}; run it: translution launch {out}")
