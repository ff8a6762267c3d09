"""``translution plan``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from translution import planner
from translution.planner.common import InputError, check_new_folder
from translution.planner.deepspeed import config_warnings
from translution.planner.plans import PLAN_FILE
from translution.planner.search import HybridRow, save_hybrids, write_search_folder

from ...completion import choices, complete_cluster, complete_data
from ...options import (
    BATCH_PANEL,
    OUTPUT_PANEL,
    SEARCH_PANEL,
    STRATEGY_PANEL,
    TRAINING_PANEL,
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
    complete_offload,
    join_settings,
)
from ...output import console, note, print_json
from ...progress import WorkProgress
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
    traffic_table,
)
from ...verdict import print_no_plan, print_verdict
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
        typer.Option(
            help="cpu:RANKS (this machine), [NODESx]GPUSxNAME, [NODESx]NODE, or a YAML/JSON file.",
            autocompletion=complete_cluster,
        ),
    ],
    operator: OperatorOption = None,
    roles: RolesOption = None,
    c1: C1Option = None,
    c2: C2Option = None,
    relative_layers: RelativeLayersOption = None,
    settings: SetOption = None,
    global_batch: Annotated[
        int | None,
        typer.Option(
            help="Samples per optimizer step over all ranks; 8 per rank by default.", rich_help_panel=BATCH_PANEL
        ),
    ] = None,
    micro_batch: Annotated[
        int | None,
        typer.Option(help="Samples per rank and forward pass; chosen by default.", rich_help_panel=BATCH_PANEL),
    ] = None,
    gradient_accumulation_steps: Annotated[
        int | None,
        typer.Option(
            "--accumulation",
            "--gradient-accumulation-steps",
            help="Micro-batches per optimizer step; chosen by default.",
            rich_help_panel=BATCH_PANEL,
        ),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            help="Train as published, unless other options say otherwise: translution-vit, translution-gpt.",
            rich_help_panel=TRAINING_PANEL,
            autocompletion=choices("translution-vit", "translution-gpt"),
        ),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="Optimizer steps.", show_default="100", rich_help_panel=TRAINING_PANEL)
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option(help="Samples of an epoch; with --epochs sets the steps.", rich_help_panel=TRAINING_PANEL),
    ] = None,
    epochs: Annotated[
        float | None, typer.Option(help="Passes over --samples.", show_default="1", rich_help_panel=TRAINING_PANEL)
    ] = None,
    warmup_steps: Annotated[
        int | None,
        typer.Option(
            help="Steps of linear warm-up before the cosine decay.", show_default="0", rich_help_panel=TRAINING_PANEL
        ),
    ] = None,
    learning_rate: Annotated[
        float | None,
        typer.Option(help="Peak learning rate of AdamW.", show_default="0.001", rich_help_panel=TRAINING_PANEL),
    ] = None,
    weight_decay: Annotated[
        float | None, typer.Option(help="Weight decay of AdamW.", show_default="0.05", rich_help_panel=TRAINING_PANEL)
    ] = None,
    gradient_clipping: Annotated[
        float | None,
        typer.Option(
            help="Maximum gradient norm; 0 disables clipping.", show_default="1", rich_help_panel=TRAINING_PANEL
        ),
    ] = None,
    precision: PrecisionOption = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="digits, digits-static, digits-shifted, digits-patches, images, tokens, stdlib or synthetic.",
            show_default="synthetic, or digits for a model of one channel and ten classes",
            rich_help_panel=TRAINING_PANEL,
            autocompletion=complete_data,
        ),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(
            help="Seed of the weights and the sample order.", show_default="0", rich_help_panel=TRAINING_PANEL
        ),
    ] = None,
    engine: Annotated[
        str,
        typer.Option(
            help="What shards: deepspeed, or fsdp2 (torch's fully_shard).",
            rich_help_panel=STRATEGY_PANEL,
            autocompletion=choices("deepspeed", "fsdp2"),
        ),
    ] = "deepspeed",
    stage: Annotated[
        int | None, typer.Option(min=0, max=3, help="ZeRO stage; chosen by default.", rich_help_panel=STRATEGY_PANEL)
    ] = None,
    tile_relations: TileOption = None,
    relation_parallel: Annotated[
        int | None,
        typer.Option(
            help="Ranks that share out the relations, so that tokens travel instead of tables; 1 for none; chosen by "
            "default, unless --stage is given.",
            rich_help_panel=STRATEGY_PANEL,
        ),
    ] = None,
    offload: Annotated[
        str | None,
        typer.Option(
            help="What is offloaded: none, cpu-optimizer, cpu, nvme-optimizer or nvme; chosen by default.",
            rich_help_panel=STRATEGY_PANEL,
            autocompletion=complete_offload,
        ),
    ] = None,
    nvme_path: NvmePathOption = None,
    offload_ratio: Annotated[
        float | None,
        typer.Option(
            help="Fraction of the optimizer state to offload, for cpu-optimizer; chosen by default.",
            rich_help_panel=STRATEGY_PANEL,
        ),
    ] = None,
    checkpointing: Annotated[
        str | None,
        typer.Option(
            help="none, block or offload; by default the model's, or chosen if the model has none.",
            rich_help_panel=STRATEGY_PANEL,
            autocompletion=choices("none", "block", "offload"),
        ),
    ] = None,
    minimize: Annotated[
        str,
        typer.Option(
            help="time, nodes, cost or memory.",
            rich_help_panel=SEARCH_PANEL,
            autocompletion=choices("time", "nodes", "cost", "memory"),
        ),
    ] = "time",
    headroom: Annotated[
        float, typer.Option(help="Fraction of every memory that must stay free.", rich_help_panel=SEARCH_PANEL)
    ] = 0.08,
    all_nodes: Annotated[
        bool, typer.Option("--all-nodes", help="Use every node of the cluster.", rich_help_panel=SEARCH_PANEL)
    ] = False,
    quantized: Annotated[
        bool,
        typer.Option(
            "--quantized",
            help="Allow ZeRO++ to round what ranks exchange to integers (qwZ, qgZ).",
            rich_help_panel=STRATEGY_PANEL,
        ),
    ] = False,
    training_settings: TrainOption = None,
    zero_settings: ZeroOption = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Plan folder to write; without it the plan is only printed.", rich_help_panel=OUTPUT_PANEL),
    ] = None,
    force: Annotated[
        bool,
        typer.Option("--force", help="Replace an existing plan folder; its runs stay.", rich_help_panel=OUTPUT_PANEL),
    ] = False,
    verbose: Annotated[
        bool,
        typer.Option("--verbose", "-v", help="Also print every reason, time and size.", rich_help_panel=OUTPUT_PANEL),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Find the fastest way to train a model on a cluster that fits, and write it as a plan folder."""
    flags = {"operator": operator, "roles": roles, "c1": c1, "c2": c2, "relative_layers": relative_layers}
    spec = planner.load_model(model, **join_settings(flags | {"checkpointing": checkpointing}, settings, "--set"))
    given: dict[str, object] = {
        "global_batch": global_batch,
        "engine": engine,
        "stage": stage,
        "tile_relations": tile_relations,
        "relation_parallel": relation_parallel,
        "offload": offload,
        "offload_ratio": offload_ratio,
        "nvme_path": nvme_path,
        "checkpointing": checkpointing,
        "minimize": minimize,
        "headroom": headroom,
        "all_nodes": all_nodes,
        "quantized": quantized,
        "zero_overrides": join_settings({}, zero_settings, "--zero"),
    }
    # The recipe, or else the defaults, decide about these fields unless they are given.
    training = {
        "micro_batch": micro_batch,
        "gradient_accumulation_steps": gradient_accumulation_steps,
        "precision": precision,
        "seed": seed,
        "steps": steps,
        "warmup_steps": warmup_steps,
        "learning_rate": learning_rate,
        "weight_decay": weight_decay,
        "gradient_clipping": gradient_clipping,
        "data": data,
    }
    given |= join_settings(training, training_settings, "--train")
    if out is None and force:
        raise InputError("force: is not allowed: must be used with --out")
    if out is not None:
        check_new_folder(out.absolute(), marker=PLAN_FILE, force=force)
    where = planner.load_cluster(cluster)
    if minimize == "cost" and where.price_per_gpu_hour is None:
        note("--minimize cost: the cluster has no price_per_gpu_hour, so the plan takes the fewest GPU-hours")
    try:
        with WorkProgress("searching") as progress:
            result = planner.plan(
                spec, where, recipe=recipe, samples=samples, epochs=epochs, on_progress=progress.show, **given
            )
    except planner.NoPlanFits as error:
        _print_no_plan(error, spec, where.name, out, as_json=as_json, verbose=verbose)
        raise
    if out is not None:
        write_search_folder(result, out, force=force)
    if as_json:
        cost = result.plan.run_cost
        document = {"folder": None if out is None else str(out), **result.model_dump(mode="json")}
        print_json(document | {"run": None if cost is None else cost.model_dump()})
        return
    print_verdict(result, out, minimize, to := console())
    for remark in config_warnings(result.plan.training, result.plan.zero):
        note(remark)
    if verbose:
        _print_details(result, to)


def _print_details(result: planner.SearchResult, to: Console) -> None:
    plan = result.plan
    tables = [strategies_table(result.strategies)]
    traffic = traffic_table(plan)
    tables += [*([traffic] if traffic is not None else []), knobs_table(result), pareto_table(result)]
    if plan.time is not None:
        tables.append(step_time_table(plan, plan.time))
    tables += [phase_table("Predicted peak memory per rank", plan.prediction), *peak_tables(plan.prediction)]
    for table in tables:
        to.print()
        to.print(table)
    to.print()
    if plan.time is not None and plan.run_cost is not None:
        to.print(format_run_cost(plan.run_cost, plan.time))
    to.print(format_evaluation(plan))


def _print_no_plan(
    error: planner.NoPlanFits,
    spec: planner.ModelSpec,
    cluster: str,
    out: Path | None,
    *,
    as_json: bool,
    verbose: bool,
) -> None:
    """Print what would fit and, if asked for, what was tried; next to a folder write a spec file for each hybrid."""
    hybrids: dict[Path | int, HybridRow] = dict(enumerate(error.hybrids))
    if out is not None:
        written = save_hybrids(spec, error.hybrids, out.with_name(f"{out.name}-hybrids"))
        hybrids = dict[Path | int, HybridRow](written.items())
    if as_json:
        files = [{"file": str(path)} if isinstance(path, Path) else {} for path in hybrids]
        print_json(
            {
                "error": str(error),
                "families": [verdict.model_dump() for verdict in error.strategies],
                "advice": [advice.model_dump() for advice in error.advice],
                "hybrids": [row.model_dump() | file for row, file in zip(hybrids.values(), files, strict=True)],
            }
        )
        return
    to = console()
    print_no_plan(error, spec.name, cluster, hybrids, to)
    if verbose:
        for table in (advice_table(error.advice, hybrids), strategies_table(error.strategies)):
            to.print()
            to.print(table)
