"""``translution plan``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from pydantic import TypeAdapter

from translution.planner.common.errors import InputError
from translution.planner.common.files import check_new_folder
from translution.planner.common.schema import validate
from translution.planner.common.units import format_bytes, format_count
from translution.planner.config.loading import save_model
from translution.planner.config.model import ModelSpec, override
from translution.planner.config.training import TrainingSpec
from translution.planner.costs.parameters import count_parameters
from translution.planner.deepspeed.config import remarks
from translution.planner.hardware.cluster import load_cluster
from translution.planner.plans.build import make_plan
from translution.planner.plans.folder import write_plan_folder
from translution.planner.plans.plan import PLAN_FILE, Plan
from translution.planner.search.advice import describe_hybrid
from translution.planner.search.constraints import SearchConstraints
from translution.planner.search.explain import SearchResult, StrategyVerdict
from translution.planner.search.plan_search import NoPlanFits, RunCost, run_cost, search_plan, steps_for_epochs
from translution.planner.timing.step_time import StepTime

from ..options import (
    C1Option,
    C2Option,
    JsonOption,
    ModelArgument,
    NvmePathOption,
    OperatorOption,
    PrecisionOption,
    RelativeLayersOption,
    RolesOption,
    SetOption,
    TileOption,
    TrainOption,
    ZeroOption,
    parse_settings,
    resolve_model,
)
from ..output import console, make_table, print_json
from ..tables.memory import phase_table, peak_tables
from . import app

_TRAINING: TypeAdapter[TrainingSpec] = TypeAdapter(TrainingSpec)
_WISHES: TypeAdapter[SearchConstraints] = TypeAdapter(SearchConstraints)


@dataclass(frozen=True)
class PlanRequest:
    """What the user wrote."""

    spec: ModelSpec
    cluster: str
    training: Mapping[str, object]
    """Fields of `TrainingSpec`."""
    constraints: Mapping[str, object]
    """Fields of `SearchConstraints`."""
    samples: int | None
    """Of an epoch; None leaves the steps as they are."""
    epochs: float

    def search_plan(self) -> SearchResult:
        """Search."""
        cluster = load_cluster(self.cluster)
        constraints = validate(_WISHES, dict(self.constraints), "plan", tuple(SearchConstraints.model_fields))
        training = validate(_TRAINING, dict(self.training), "plan", tuple(TrainingSpec.model_fields))
        if self.samples is not None:
            for name, value in (("samples", self.samples), ("epochs", self.epochs)):
                if not value > 0:
                    raise InputError(f"{name}: {value} is not allowed: must be above 0")
            steps = steps_for_epochs(self.samples, self.epochs, constraints, cluster)
            training = validate(_TRAINING, training.model_dump() | {"steps": steps}, "plan", ())
        return search_plan(self.spec, cluster, training, constraints)


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
    zero_overrides: Mapping[str, object],
) -> Plan:
    """Make a plan of what the user wrote, without a search.

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
        zero_overrides=zero_overrides,
    )


def _no_plan(error: NoPlanFits, spec: ModelSpec, out: Path, *, as_json: bool) -> None:
    """Print what was tried and what would do, and write a spec file for each hybrid."""
    folder = out.with_name(f"{out.name}-hybrids")
    files = {}
    for row in error.hybrids:
        name = f"first-{row.full_layers}-{row.rest}{f'-{row.c1}' if row.c1 else ''}"
        path = folder / f"{name}.yaml"
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as problem:
            raise InputError(f"{folder}: cannot be written: {problem.strerror}") from None
        save_model(override(spec, name=f"{spec.name} {name}", **row.changes), path)
        files[str(path)] = row
    if as_json:
        document: dict[str, Any] = {
            "error": str(error),
            "families": [verdict.model_dump() for verdict in error.strategies],
            "advice": [advice.model_dump() for advice in error.advice],
            "hybrids": [row.model_dump() | {"file": path} for path, row in files.items()],
        }
        print_json(document)
        return
    out_console = console()
    out_console.print(_strategies_table(error.strategies))
    rows = [(advice.kind, advice.text) for advice in error.advice]
    rows += [("hybrid", f"{describe_hybrid(row)} ({path})") for path, row in files.items()]
    if rows:
        out_console.print(make_table("What would do, one of these", ("change", "to"), rows, text_columns=2))


def _strategies_table(strategies: tuple[StrategyVerdict, ...]) -> Any:
    rows = [(f"{'* ' if verdict.chosen else ''}{verdict.strategy}", verdict.reason) for verdict in strategies]
    return make_table("What was tried", ("family", "reason"), rows, text_columns=2)


def _time_table(time: StepTime, plan: Plan) -> Any:
    rows = [
        (
            entry.name,
            entry.bound + (", beside the computation" if entry.overlaps else ""),
            f"{entry.likely_s:.3g}",
            f"{entry.low_s:.3g} to {entry.high_s:.3g}",
        )
        for entry in time.breakdown
    ]
    rows.append(("step", time.bound, f"{time.likely_s:.3g}", f"{time.low_s:.3g} to {time.high_s:.3g}"))
    measured = "measured rates" if plan.cluster.measured else "shares of the peaks, estimated"
    title = f"Predicted seconds of a step, by {measured}"
    return make_table(title, ("part", "waits for", "seconds", "from, to"), rows, text_columns=2)


def _cost_text(cost: RunCost, time: StepTime) -> str:
    hours = f"{cost.likely_s / 3600:.3g} h ({cost.low_s / 3600:.3g} to {cost.high_s / 3600:.3g})"
    price = "" if cost.price is None else f", {cost.price:,.0f} at the cluster's price"
    return (
        f"{time.samples_per_s:.3g} samples/s, {time.mfu:.1%} of the peak; {cost.steps} steps of "
        f"{cost.samples // cost.steps} samples: {hours}, {cost.gpu_hours:.3g} GPU-hours{price}"
    )


@app.command(
    "plan",
    epilog="Examples: **translution plan my.yaml --cluster cpu:2 --out plans/small** · **translution plan vit-base/16 "
    "--cluster 2x8xH100 --precision bf16 --data synthetic --global-batch 1024 --out plans/large**",
)
def plan_cli(
    model: ModelArgument,
    cluster: Annotated[
        str,
        typer.Option(help="cpu:RANKS (this machine), [NODESx]GPUSxNAME, [NODESx]NODE, or a YAML/JSON file."),
    ],
    out: Annotated[Path, typer.Option(help="Plan folder to write.")],
    operator: OperatorOption = None,
    roles: RolesOption = None,
    c1: C1Option = None,
    c2: C2Option = None,
    relative_layers: RelativeLayersOption = None,
    settings: SetOption = None,
    global_batch: Annotated[
        int | None, typer.Option(help="Samples per optimizer step over all ranks; 8 per rank by default.")
    ] = None,
    micro_batch: Annotated[
        int | None, typer.Option(help="Samples per rank and forward pass; chosen by default.")
    ] = None,
    gradient_accumulation_steps: Annotated[
        int | None,
        typer.Option(
            "--accumulation",
            "--gradient-accumulation-steps",
            help="Micro-batches per optimizer step; chosen by default.",
        ),
    ] = None,
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 100,
    samples: Annotated[int | None, typer.Option(help="Samples of an epoch; with --epochs sets the steps.")] = None,
    epochs: Annotated[float, typer.Option(help="Passes over --samples.")] = 1.0,
    warmup_steps: Annotated[int, typer.Option(help="Steps of linear warm-up before the cosine decay.")] = 0,
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate of AdamW.")] = 1e-3,
    weight_decay: Annotated[float, typer.Option(help="Weight decay of AdamW.")] = 0.05,
    gradient_clipping: Annotated[float, typer.Option(help="Maximum gradient norm; 0 disables clipping.")] = 1.0,
    precision: PrecisionOption = "fp32",
    data: Annotated[
        str,
        typer.Option(
            help="digits, digits-static, digits-shifted, digits-patches, images, tokens, stdlib or synthetic."
        ),
    ] = "digits",
    seed: Annotated[int, typer.Option(help="Seed of the weights and the sample order.")] = 0,
    stage: Annotated[int | None, typer.Option(min=0, max=3, help="ZeRO stage; chosen by default.")] = None,
    tile_relations: TileOption = None,
    offload: Annotated[
        str | None,
        typer.Option(help="What is offloaded: none, cpu-optimizer, cpu, nvme-optimizer or nvme; chosen by default."),
    ] = None,
    nvme_path: NvmePathOption = None,
    offload_ratio: Annotated[
        float | None,
        typer.Option(help="Fraction of the optimizer state to offload, for cpu-optimizer; chosen by default."),
    ] = None,
    checkpointing: Annotated[
        str | None, typer.Option(help="none, block or offload; the model's by default, chosen if that is none.")
    ] = None,
    minimize: Annotated[str, typer.Option(help="time, nodes, cost or memory.")] = "time",
    headroom: Annotated[float, typer.Option(help="Fraction of every memory that must stay free.")] = 0.08,
    all_nodes: Annotated[bool, typer.Option("--all-nodes", help="Use every node of the cluster.")] = False,
    training_settings: TrainOption = None,
    zero_settings: ZeroOption = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing plan folder; its runs stay.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Search for the best plan for a cluster, explain the choice and write the plan folder."""
    spec = resolve_model(model, operator, roles, c1, c2, relative_layers, settings)
    training = {
        "steps": steps,
        "warmup_steps": warmup_steps,
        "learning_rate": learning_rate,
        "weight_decay": weight_decay,
        "gradient_clipping": gradient_clipping,
        "precision": precision,
        "data": data,
        "seed": seed,
    } | parse_settings(training_settings, "--train")
    constraints = {
        "global_batch": global_batch,
        "micro_batch": training.pop("micro_batch", micro_batch),
        "accumulation": training.pop("accumulation", gradient_accumulation_steps),
        "stage": stage,
        "offload": offload,
        "offload_ratio": offload_ratio,
        "nvme_path": nvme_path,
        "checkpointing": _checkpointing(checkpointing, spec),
        "tile_relations": tile_relations,
        "all_nodes": all_nodes,
        "headroom": headroom,
        "minimize": minimize,
        "zero_overrides": parse_settings(zero_settings, "--zero"),
    }
    request = PlanRequest(spec, cluster, training, constraints, samples, epochs)
    check_new_folder(out.absolute(), marker=PLAN_FILE, force=force)
    try:
        result = request.search_plan()
    except NoPlanFits as error:
        _no_plan(error, request.spec, out, as_json=as_json)
        raise
    plan = result.plan
    write_plan_folder(plan, out, force=force)
    cost = None if plan.time is None else run_cost(plan.time, plan.cluster, plan.training)
    if as_json:
        document = {"folder": str(out), **result.model_dump(mode="json")}
        print_json(document | {"run": None if cost is None else cost.model_dump()})
        return
    _print(result, cost, out)


def _checkpointing(requested: str | None, spec: ModelSpec) -> str | None:
    """Return the requested mode or the model's own; None, which lets the search choose, if that is "none"."""
    if requested is not None:
        return requested
    return None if spec.checkpointing == "none" else spec.checkpointing


def _print(result: SearchResult, cost: RunCost | None, out: Path) -> None:
    plan, out_console = result.plan, console()
    ranks = plan.cluster.world_size
    tiles = "" if plan.tile_relations is None else f", {plan.tile_relations} relations per tile"
    parameters = format_count(count_parameters(plan.model).total)
    out_console.print(
        f"{plan.model.name}: {parameters} parameters, ZeRO-{plan.zero.stage} on {ranks} ranks "
        f"({plan.cluster.name}){tiles}, {plan.training.global_batch(ranks)} samples per step"
    )
    out_console.print(_strategies_table(result.strategies))
    knobs = [(knob.knob, knob.value, knob.reason) for knob in result.knobs]
    title = f"Chosen of {result.considered:,} candidates"
    out_console.print(make_table(title, ("knob", "value", "reason"), knobs, text_columns=3))
    points = [
        (
            f"{point.step_s:.3g}",
            format_bytes(point.device_bytes),
            str(point.nodes),
            point.strategy,
            str(point.micro_batch),
            point.checkpointing,
        )
        for point in result.pareto
    ]
    columns = ("seconds", "device, at most", "nodes", "family", "micro-batch", "checkpointing")
    out_console.print(make_table("Pareto: no plan is faster with less", columns, points))
    if plan.time is not None and cost is not None:
        out_console.print(_time_table(plan.time, plan))
        out_console.print(_cost_text(cost, plan.time))
    out_console.print(phase_table("Predicted memory of each rank, at the worst moment of each phase", plan.prediction))
    for worst in peak_tables(plan.prediction):
        out_console.print(worst)
    for remark in remarks(plan.training, plan.zero):
        out_console.print(f"note: {remark}")
    hosts = f" --hostfile {out / 'hostfile'}" if plan.cluster.nodes > 1 else ""
    out_console.print(f"wrote {out}; run it: translution launch {out}{hosts}", soft_wrap=True)
