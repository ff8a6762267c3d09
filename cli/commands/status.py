"""``translution status``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from translution.distributed.runs.folder import require_run
from translution.distributed.runs.status import read_statuses
from translution.planner.plans.plan import load_plan

from ..options import JsonOption
from ..output import print_json
from . import app


@app.command("status", epilog="Example: **translution status plans/small/runs/001**")
def status_cli(
    run: Annotated[Path, typer.Argument(metavar="RUN_FOLDER", help="A run folder.")],
    as_json: JsonOption = False,
) -> None:
    """Print the last status that every rank reported; exit with 0 if all have finished, otherwise with 1."""
    ranks = load_plan(require_run(run)).cluster.world_size
    said = {status.rank: status for status in read_statuses(run)}
    finished = all(rank in said and said[rank].state == "finished" for rank in range(ranks))
    if as_json:
        print_json({"finished": finished, "ranks": [said[rank].model_dump() for rank in sorted(said)]})
    else:
        for rank in range(ranks):
            status = said.get(rank)
            if status is None:
                print(f"rank {rank}: never started")
            else:
                words = f": {status.message}" if status.message else ""
                print(f"rank {rank}: {status.state} at step {status.step}, {status.time_utc}{words}")
    if not finished:
        raise typer.Exit(1)
