"""``translution experiment``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from translution.distributed.experiments import Trial, find_experiment, run_experiment

from ...completion import choices
from ...extras import requires_extra
from ...options import JsonOption
from ...output import console, make_table, note, print_json
from ...progress import WorkProgress
from .. import app

complete_name = choices("shift", "ablation", "rank", "roles", "language")


@app.command(
    "experiment",
    epilog="Examples: **translution experiment shift** · **translution experiment language --quick --out quick**",
)
def experiment_cli(
    name: Annotated[
        str,
        typer.Argument(metavar="NAME", help="shift, ablation, rank, roles or language.", autocompletion=complete_name),
    ],
    out: Annotated[
        Path | None,
        typer.Option(help="Folder to write: raw figures, a table and a picture; experiments/NAME by default."),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Run a few steps of one seed, as a quick check.")] = False,
    seeds: Annotated[int | None, typer.Option(min=1, help="Number of seeds; 3 by default.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Steps of each model; the experiment's by default.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier result in that folder.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Train small models of every operator to answer one of the paper's questions."""
    with requires_extra("report"):
        from translution import reports
        from translution.reports.sections import experiment_cells
    experiment = find_experiment(name)
    out = Path("experiments", name) if out is None else out
    reports.check_experiment_folder(out, force=force)

    with WorkProgress("training", "models") as progress:

        def show(trial: Trial, number: int, count: int) -> None:
            note(f"{number}/{count}: {trial.variant}, {trial.train}, seed {trial.seed}: {trial.seconds:.0f} s")
            progress.show(number, count)

        def show_waiting(finished: int, count: int, workers: int) -> None:
            note(f"{finished} of {count} trials finished; {min(workers, count - finished)} running")

        result = run_experiment(experiment, quick=quick, seeds=seeds, steps=steps, on_trial=show, on_wait=show_waiting)
    reports.write_experiment(result, out, force=force)
    if as_json:
        print_json({"summaries": [row.model_dump() for row in result.summaries()], "seconds": result.seconds})
        return
    headings, cells = experiment_cells(result)
    console().print(make_table(experiment.question, headings, cells))
    picture = reports.EXPERIMENT_PICTURE
    names = f"{reports.EXPERIMENT_FILE}, {reports.EXPERIMENT_TABLE}, {picture}.svg and .png"
    console().print(f"wrote {out}: {names}")
