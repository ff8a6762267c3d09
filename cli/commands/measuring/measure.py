"""``translution measure``."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Annotated, cast

import typer
from rich.console import Console

from translution import planner
from translution.planner.common import InputError
from translution.planner.config import default_precision, parse_training
from translution.planner.search import Stage, check_constraints, parse_constraints

from ...completion import complete_cluster, complete_model
from ...extras import requires_extra
from ...options import (
    JsonOption,
    NvmePathOption,
    OffloadOption,
    OffloadRatioOption,
    PrecisionOption,
    SetOption,
    StageOption,
    TileOption,
    TrainOption,
    ZeroOption,
    join_settings,
)
from ...progress import WorkProgress
from .. import app
from .verify import print_verification


@app.command(
    "measure",
    epilog="Examples: **translution measure plans/small** · **translution measure vit-tiny/56 --cluster cpu:2 "
    "--stage 2** · **translution measure my.yaml --cluster cpu:2 --offload nvme --nvme-path /nvme/swap**",
)
def measure_cli(
    context: typer.Context,
    target: Annotated[
        str,
        typer.Argument(
            metavar="PLAN_OR_MODEL", help="A plan folder, or a preset or model file.", autocompletion=complete_model
        ),
    ],
    cluster: Annotated[
        str, typer.Option(help="cpu:RANKS, or GPUSxNAME of this machine; for a model.", autocompletion=complete_cluster)
    ] = "cpu:1",
    settings: SetOption = None,
    precision: PrecisionOption = None,
    micro_batch: Annotated[
        int | None, typer.Option(help="Samples per rank and forward pass.", show_default="1")
    ] = None,
    stage: StageOption = 3,
    tile_relations: TileOption = None,
    offload: OffloadOption = "none",
    nvme_path: NvmePathOption = None,
    offload_ratio: OffloadRatioOption = None,
    training_settings: TrainOption = None,
    zero_settings: ZeroOption = None,
    resume: Annotated[bool, typer.Option(help="Also measure resuming from the checkpoint.")] = True,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the plan and the run; removed after the command by default.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Run a model or plan for a few steps and compare predicted with measured memory, phase by phase."""
    if Path(target).is_dir():
        _refuse_options_of_models(context)
        plan = planner.load_plan(target)
    else:
        where = planner.load_cluster(cluster)
        given = join_settings({"precision": precision, "micro_batch": micro_batch}, training_settings, "--train")
        overrides = join_settings({}, zero_settings, "--zero")
        fixed = {"stage": stage, "offload": offload, "nvme_path": nvme_path, "offload_ratio": offload_ratio}
        check_constraints(parse_constraints(fixed | {"zero_overrides": overrides}, "measure"))
        defaults = {"precision": default_precision(where), "micro_batch": 1, "data": "synthetic"}
        plan = planner.make_plan(
            planner.load_model(target, **join_settings({}, settings, "--set")),
            where,
            parse_training(defaults | given, "measure"),
            stage=cast(Stage, stage),
            tile_relations=tile_relations,
            offload=offload,
            nvme_path=nvme_path,
            offload_ratio=1.0 if offload_ratio is None else offload_ratio,
            zero_overrides=overrides,
        )
    _measure(plan, out, resume=resume, as_json=as_json)


def _refuse_options_of_models(context: typer.Context) -> None:
    """Refuse options that say how a model is planned: a plan folder has all of that."""
    for name in context.params:
        source = context.get_parameter_source(name)
        if name not in _OPTIONS_OF_PLANS and source is not None and source.name == "COMMANDLINE":
            flag = {"settings": "set", "training_settings": "train", "zero_settings": "zero"}.get(name, name)
            raise InputError(f"{flag}: is not allowed with a plan folder, which has its own: must be used with a model")


_OPTIONS_OF_PLANS = ("target", "resume", "out", "as_json")


def _measure(plan: planner.Plan, out: Path | None, *, resume: bool, as_json: bool) -> None:
    """Run a plan for a few steps and print predicted and measured memory.

    Args:
        plan: the plan to run.
        out: folder for the plan and the run; None uses a temporary one.
        resume: also measure resuming.
        as_json: print JSON instead of a table.
    """
    with requires_extra("train"):
        from translution.distributed.verification import few_steps, measure_plan
    console = Console(stderr=True, highlight=False, markup=False)
    temporary = Path(tempfile.mkdtemp(prefix="translution-measure-")) if out is None else None
    try:
        folder = temporary / "plan" if temporary is not None else out
        assert folder is not None
        with WorkProgress("measuring", "runs of the ranks") as progress:
            run = measure_plan(few_steps(plan), folder, console.print, resume=resume, on_progress=progress.show)
        print_verification(run, as_json=as_json, kept=temporary is None)
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
