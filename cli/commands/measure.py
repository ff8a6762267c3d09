"""``translution measure``."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from translution.planner.common.errors import InputError
from translution.planner.plans.plan import PLAN_FILE, Plan, load_plan

from ..extras import requires_extra
from ..options import (
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
    parse_settings,
    resolve_model,
)
from . import app
from .plan import plan_from
from .verify import print_verification


@app.command(
    "measure",
    epilog="Examples: **translution measure plans/small** · **translution measure vit-tiny/56 --cluster cpu:2 "
    "--stage 2** · **translution measure my.yaml --cluster cpu:2 --offload nvme --nvme-path /nvme/swap**",
)
def measure_cli(
    target: Annotated[str, typer.Argument(metavar="PLAN_OR_MODEL", help="A plan folder, or a preset or model file.")],
    cluster: Annotated[str, typer.Option(help="cpu:RANKS, or GPUSxNAME of this machine; for a model.")] = "cpu:1",
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
    plan = _plan_of(Path(target))
    if plan is None:
        training = {"precision": precision, "micro_batch": micro_batch, "data": "synthetic"}
        plan = plan_from(
            resolve_model(target, None, None, None, None, None, settings),
            cluster,
            training | parse_settings(training_settings, "--train"),
            stage=_stage(stage),
            tile_relations=tile_relations,
            offload=offload,
            nvme_path=nvme_path,
            offload_ratio=offload_ratio,
            zero_overrides=parse_settings(zero_settings, "--zero"),
        )
    _measure(plan, out, resume=resume, as_json=as_json)


def _stage(value: int) -> Literal[0, 1, 2, 3]:
    return value  # type: ignore[return-value]  # typer keeps it within 0 and 3


def _measure(plan: Plan, out: Path | None, *, resume: bool, as_json: bool) -> None:
    """Run a plan for a few steps and print predicted beside measured memory.

    Args:
        plan: what to run.
        out: the folder to keep plan and run in; None keeps neither.
        resume: also measure resuming.
        as_json: print JSON instead of a table.
    """
    with requires_extra("train"):
        from translution.distributed.verification.measured_run import few_steps, measure_plan
    console = Console(stderr=True, highlight=False, markup=False)
    kept = Path(tempfile.mkdtemp(prefix="translution-measure-")) if out is None else None
    try:
        folder = out if kept is None else kept / "plan"
        assert folder is not None
        run = measure_plan(few_steps(plan), folder, console.print, resume=resume)
        print_verification(run, as_json=as_json)
    finally:
        if kept is not None:
            shutil.rmtree(kept, ignore_errors=True)


def _plan_of(folder: Path) -> Plan | None:
    """The plan, if it is a plan folder; None if it may be a model's name.

    Raises:
        InputError: if it is a folder without a plan.
    """
    if not folder.is_dir():
        return None
    if not (folder / PLAN_FILE).is_file():
        raise InputError(f"{folder}: is not a plan folder: must hold {PLAN_FILE}")
    return load_plan(folder)
