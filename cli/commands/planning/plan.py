"""``translution plan``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from translution import planner
from translution.planner.common import check_new_folder, format_count
from translution.planner.costs import count_parameters
from translution.planner.deepspeed import config_warnings
from translution.planner.plans import PLAN_FILE
from translution.planner.search import save_hybrids

from ...options import (
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
)
from ...output import console, print_json
from ...tables import (
    advice_table,
    format_evaluation,
    format_run_cost,
    knobs_table,
    pareto_table,
    peak_tables,
    phase_table,
    step_time_table,
    strategies_table,
)
from .. import app


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
    recipe: Annotated[
        str | None,
        typer.Option(help="Train as published, unless other options say otherwise: translution-vit, translution-gpt."),
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps.", show_default="100")] = None,
    samples: Annotated[int | None, typer.Option(help="Samples of an epoch; with --epochs sets the steps.")] = None,
    epochs: Annotated[float | None, typer.Option(help="Passes over --samples.", show_default="1")] = None,
    warmup_steps: Annotated[
        int | None, typer.Option(help="Steps of linear warm-up before the cosine decay.", show_default="0")
    ] = None,
    learning_rate: Annotated[
        float | None, typer.Option(help="Peak learning rate of AdamW.", show_default="0.001")
    ] = None,
    weight_decay: Annotated[float | None, typer.Option(help="Weight decay of AdamW.", show_default="0.05")] = None,
    gradient_clipping: Annotated[
        float | None, typer.Option(help="Maximum gradient norm; 0 disables clipping.", show_default="1")
    ] = None,
    precision: PrecisionOption = "fp32",
    data: Annotated[
        str | None,
        typer.Option(
            help="digits, digits-static, digits-shifted, digits-patches, images, tokens, stdlib or synthetic.",
            show_default="digits",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the weights and the sample order.")] = 0,
    engine: Annotated[str, typer.Option(help="What shards: deepspeed, or fsdp2 (torch's fully_shard).")] = "deepspeed",
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
        str | None,
        typer.Option(help="none, block or offload; by default the model's, or chosen if the model has none."),
    ] = None,
    minimize: Annotated[str, typer.Option(help="time, nodes, cost or memory.")] = "time",
    headroom: Annotated[float, typer.Option(help="Fraction of every memory that must stay free.")] = 0.08,
    all_nodes: Annotated[bool, typer.Option("--all-nodes", help="Use every node of the cluster.")] = False,
    quantized: Annotated[
        bool, typer.Option("--quantized", help="Allow ZeRO++ to round what ranks exchange to integers (qwZ, qgZ).")
    ] = False,
    training_settings: TrainOption = None,
    zero_settings: ZeroOption = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing plan folder; its runs stay.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Search for the best plan for a cluster, explain the choice and write the plan folder."""
    flags = {"operator": operator, "roles": roles, "c1": c1, "c2": c2, "relative_layers": relative_layers}
    spec = planner.load_model(model, **(flags | dict(settings or ())))
    given: dict[str, object] = {
        "global_batch": global_batch,
        "micro_batch": micro_batch,
        "accumulation": gradient_accumulation_steps,
        "precision": precision,
        "seed": seed,
        "engine": engine,
        "stage": stage,
        "tile_relations": tile_relations,
        "offload": offload,
        "offload_ratio": offload_ratio,
        "nvme_path": nvme_path,
        "checkpointing": checkpointing,
        "minimize": minimize,
        "headroom": headroom,
        "all_nodes": all_nodes,
        "quantized": quantized,
        "zero_overrides": dict(zero_settings or ()),
    }
    # The recipe, or else the defaults, decide about these fields unless they are given.
    training = {
        "steps": steps,
        "warmup_steps": warmup_steps,
        "learning_rate": learning_rate,
        "weight_decay": weight_decay,
        "gradient_clipping": gradient_clipping,
        "data": "digits" if data is None and recipe is None else data,
    }
    given |= {name: value for name, value in training.items() if value is not None} | dict(training_settings or ())
    check_new_folder(out.absolute(), marker=PLAN_FILE, force=force)
    try:
        result = planner.plan(spec, cluster, recipe=recipe, samples=samples, epochs=epochs, **given)
    except planner.NoPlanFits as error:
        _print_no_plan(error, spec, out, as_json=as_json)
        raise
    result.plan.write(out, force=force)
    if as_json:
        cost = result.plan.run_cost
        document = {"folder": str(out), **result.model_dump(mode="json")}
        print_json(document | {"run": None if cost is None else cost.model_dump()})
        return
    _print_result(result, out)


def _print_result(result: planner.SearchResult, out: Path) -> None:
    plan, to = result.plan, console()
    tiles = "" if plan.tile_relations is None else f", {plan.tile_relations} relations per tile"
    to.print(
        f"{plan.model.name}: {format_count(count_parameters(plan.model).total)} parameters, {plan.zero.name} on "
        f"{plan.world_size} ranks ({plan.cluster.name}){tiles}, {plan.global_batch} samples per step"
    )
    if plan.training.epoch_steps is not None:
        epochs = plan.training.steps / plan.training.epoch_steps
        to.print(f"{plan.training.steps:,} steps: {epochs:g} epochs of {plan.training.epoch_steps:,} steps")
    for table in (strategies_table(result.strategies), knobs_table(result), pareto_table(result)):
        to.print(table)
    if plan.time is not None and plan.run_cost is not None:
        to.print(step_time_table(plan, plan.time))
        to.print(format_run_cost(plan.run_cost, plan.time))
    to.print(format_evaluation(plan))
    to.print(phase_table("Predicted peak memory per rank", plan.prediction))
    for table in peak_tables(plan.prediction):
        to.print(table)
    for remark in config_warnings(plan.training, plan.zero):
        to.print(f"note: {remark}")
    hosts = f" --hostfile {out / 'hostfile'}" if plan.cluster.nodes > 1 else ""
    start = out / "launch-torchrun.sh" if plan.zero.uses_fsdp2 else f"translution launch {out}{hosts}"
    to.print(f"wrote {out}; run it: {start}", soft_wrap=True)


def _print_no_plan(error: planner.NoPlanFits, spec: planner.ModelSpec, out: Path, *, as_json: bool) -> None:
    """Print the strategies tried and the changes that would fit; write a spec file for each hybrid model."""
    hybrids = save_hybrids(spec, error.hybrids, out.with_name(f"{out.name}-hybrids"))
    if as_json:
        print_json(
            {
                "error": str(error),
                "families": [verdict.model_dump() for verdict in error.strategies],
                "advice": [advice.model_dump() for advice in error.advice],
                "hybrids": [row.model_dump() | {"file": str(path)} for path, row in hybrids.items()],
            }
        )
        return
    to = console()
    to.print(strategies_table(error.strategies))
    if error.advice or hybrids:
        to.print(advice_table(error.advice, hybrids))
