"""Hidden commands that run on each rank or node; other commands and job scripts start them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from .. import app


@app.command("train", hidden=True)
def train_cli(plan_folder: Path, run: Path, mode: str = "train") -> None:
    """Run one rank of a plan; DeepSpeed's launcher or torchrun starts it on every rank."""
    from translution.distributed.runs import RunMode
    from translution.distributed.training import train

    train(plan_folder, run, RunMode(mode))


@app.command("rank", hidden=True)
def rank_cli(word: str) -> None:
    """Run one rank of a plan as the encoded payload says; `launch` starts it on every host."""
    from translution.distributed.remote import RankCommand, read_secrets

    command = RankCommand.from_payload(word)
    os.environ.update(command.environment | read_secrets(command.run))
    from translution.distributed.training import train

    train(command.plan_folder, command.run, command.mode)


@app.command("calibrate-rank", hidden=True)
def calibrate_rank_cli(
    folder: Path,
    device: str,
    nvme_path: Annotated[Path | None, typer.Argument()] = None,
    quick: Annotated[bool, typer.Option("--quick")] = False,
) -> None:
    """Measure rates as one rank; `calibrate` starts it."""
    from translution.distributed.calibration import calibrate_rank

    calibrate_rank(folder, device, nvme_path, quick=quick)


@app.command("preflight-node", hidden=True)
def preflight_node_cli(
    plan_folder: Path,
    listen: Annotated[int | None, typer.Option()] = None,
    reach: Annotated[str | None, typer.Option()] = None,
    out: Annotated[Path | None, typer.Option()] = None,
    compile_ops: Annotated[bool, typer.Option("--compile")] = False,
) -> None:
    """Report the state of this node, or compile ops on it; `launch` and Slurm jobs run it on every node."""
    from translution.distributed.preflight import compile_on_node, report_node

    if compile_ops:
        # In a Slurm job the lines of all nodes are in one file; over ssh the other end adds the host's name.
        node = os.environ.get("SLURMD_NODENAME")
        compile_on_node(plan_folder, lambda text: print(f"{node}: {text}" if node else text, flush=True))
    else:
        report_node(plan_folder, listen=listen, reach=reach, out=out)


@app.command("rehearse-rank", hidden=True)
def rehearse_rank_cli(run: Path, compute: Annotated[bool, typer.Option("--compute")] = False) -> None:
    """Run the single rank of a rehearsal; `rehearse` starts it."""
    from translution.distributed.verification import rehearse_rank

    rehearse_rank(run, compute=compute)
