"""``translution status``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from translution.distributed.runs import read_run_status

from ...options import JsonOption
from ...output import print_json
from .. import app


@app.command("status", epilog="Example: **translution status plans/small/runs/001**")
def status_cli(
    run: Annotated[
        Path, typer.Argument(metavar="RUN_FOLDER", help="A run folder, or a plan folder whose newest run is used.")
    ],
    as_json: JsonOption = False,
) -> None:
    """Print the last status of every rank, or that it has died; exit with 0 if all have finished, otherwise with 1."""
    found = read_run_status(run)
    if as_json:
        ranks = [status.model_dump() | {"dead": status.rank in found.dead} for status in found.ranks]
        print_json({"finished": found.finished, "ranks": ranks})
    else:
        for rank in range(found.world_size):
            status = found.of(rank)
            if status is None:
                print(f"rank {rank}: never started")
            else:
                message = f": {status.message}" if status.message else ""
                place = found.places.get(rank, f"at step {status.step}")
                state = f"died while {status.state}" if rank in found.dead else status.state
                print(f"rank {rank}: {state} {place}, {status.time_utc}{message}")
    if not found.finished:
        raise typer.Exit(1)
