"""``translution measure``."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Annotated, cast

import typer
from rich.console import Console

from translution import planner
from translution.planner.config import parse_training
from translution.planner.search import Stage

from ...completion import complete_cluster, complete_model
from ...extras import requires_extra
from ...options import (
    JsonOption,
    MicroBatchOption,
    NvmePathOption,
    OffloadOption,
    OffloadRatioOption,
    PrecisionOption,
    SetOption,
    StageOption,
    TileOption,
    TrainOption,
    ZeroOption,
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
    precision: PrecisionOption = "fp32",
    micro_batch: MicroBatchOption = 1,
    stage: StageOption = 3,
    tile_relations: TileOption = None,
    offload: OffloadOption = "none",
    nvme_path: NvmePathOption = None,
    offload_ratio: OffloadRatioOption = 1.0,
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
        plan = planner.load_plan(target)
    else:
        training = {"precision": precision, "micro_batch": micro_batch, "data": "synthetic"}
        plan = planner.make_plan(
            planner.load_model(target, **dict(settings or ())),
            planner.load_cluster(cluster),
            parse_training(training | dict(training_settings or ()), "measure"),
            stage=cast(Stage, stage),
            tile_relations=tile_relations,
            offload=offload,
            nvme_path=nvme_path,
            offload_ratio=offload_ratio,
            zero_overrides=dict(zero_settings or ()),
        )
    _measure(plan, out, resume=resume, as_json=as_json)


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
        print_verification(run, as_json=as_json)
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
