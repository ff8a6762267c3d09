"""``translution rehearse``."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from translution.distributed.verification import Rehearsal, format_layers, rehearse
from translution.planner.common import format_bytes

from ...extras import requires_extra
from ...options import JsonOption, PlanFolderArgument, RunFolderOption
from ...output import console, make_table, print_json
from .. import app

MEANINGLESS = "REHEARSAL: every value was meaningless; only memory was real."


class RehearsalProgress:
    """Prints the running phase on stderr: a live line on a terminal, otherwise one line per phase."""

    def __init__(self) -> None:
        self._console = Console(file=sys.stderr, highlight=False, markup=False)
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            TimeElapsedColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
            transient=True,
        )
        self._task = self._progress.add_task("")

    def __enter__(self) -> RehearsalProgress:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def print_line(self, text: str) -> None:
        """Print a permanent line."""
        self._console.print(text, soft_wrap=True)
        self._console.file.flush()

    def show(self, line: Mapping[str, Any]) -> None:
        """Show one line of the metrics file."""
        if line["event"] != "phase":
            return
        self._progress.reset(self._task, description=line["text"])
        if not self._console.is_terminal:
            self.print_line(f"  {line['text']}")


@app.command(
    "rehearse",
    epilog="Examples: **translution rehearse plans/large** · "
    "**translution rehearse plans/large --rank 511 --layers 3**",
)
def rehearse_cli(
    plan_folder: PlanFolderArgument,
    rank: Annotated[int, typer.Option(help="Rank of the planned run to rehearse.")] = 0,
    layers: Annotated[
        int | None,
        typer.Option(help="Run models of this many layers and one less, and extrapolate; by default all layers run."),
    ] = None,
    run: RunFolderOption = None,
    nvme_path: Annotated[
        str | None, typer.Option(help="Folder of this machine to use instead of the plan's NVMe path.")
    ] = None,
    compute: Annotated[
        bool, typer.Option("--compute", help="Compute the matrix products too: much slower, the same memory.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Run one rank of a plan alone on this machine to measure its memory; its values are meaningless."""
    with RehearsalProgress() as display:
        rehearsal, made = rehearse(
            plan_folder,
            rank,
            layers=layers,
            run=run,
            nvme_path=nvme_path,
            compute=compute,
            on_metrics=display.show,
            on_message=display.print_line,
        )
    print_rehearsal(rehearsal, made, as_json=as_json)


def print_rehearsal(rehearsal: Rehearsal, run: Path, *, as_json: bool) -> None:
    """Print predicted and measured memory of a rehearsal."""
    with requires_extra("train"):
        from translution.reports.inputs import predicted_and_measured
    rows = [row for row in predicted_and_measured(rehearsal.prediction, rehearsal.measurement) if row[2] or row[3]]
    if as_json:
        names = ("tier", "what", "predicted_bytes", "measured_bytes")
        memory = [dict(zip(names, row, strict=True)) for row in rows]
        document = rehearsal.model_dump(mode="json", exclude={"prediction", "measurement", "measured_layers"})
        print_json({"run": str(run), "meaning": MEANINGLESS, **document, "memory": memory})
        return
    cells = [
        (what, format_bytes(predicted), format_bytes(measured), f"{predicted / measured:.3f}" if measured else "")
        for _, what, predicted, measured in rows
    ]
    out = console()
    extrapolation = f"extrapolated from {rehearsal.layers} layers and {rehearsal.layers - 1}"
    method, figure = (extrapolation, "extrapolated") if rehearsal.extrapolated else ("all run", "measured")
    title = f"Rank {rehearsal.rank} of {rehearsal.ranks}, {rehearsal.plan}: {rehearsal.depth} layers, {method}"
    out.print(make_table(title, ("item", "predicted", figure, f"predicted / {figure}"), cells))
    planned = ", ".join(f"{format_bytes(size)} of {tier}" for tier, size in rehearsal.planned_bytes.items())
    out.print(
        f"the plan predicts for the full lifecycle of the rank: {planned}; here all tiers are host memory",
        soft_wrap=True,
    )
    for count, seconds in rehearsal.seconds.items():
        phases = ", ".join(f"{name} {value:.1f}" for name, value in seconds.items() if name != "all")
        out.print(f"{format_layers(count)} took {seconds['all']:.0f} s ({phases})", soft_wrap=True)
    products = "computed" if rehearsal.computed else "allocated and not computed"
    out.print(f"{MEANINGLESS} Matrix products were {products}; no other rank took part.", soft_wrap=True)
    out.print(f"wrote {run}", soft_wrap=True)
