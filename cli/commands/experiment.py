"""``translution experiment``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from translution.distributed.experiments.definitions import find_experiment
from translution.distributed.experiments.runner import ExperimentResult, Trial, run_experiment
from translution.planner.common.files import check_new_folder, new_folder

from ..extras import requires_extra
from ..options import JsonOption
from ..output import console, make_table, note, print_json
from . import app

RESULT, TABLE, PICTURE = "result.json", "README.md", "figure"


def write_result(result: ExperimentResult, out: Path, *, force: bool) -> None:
    """Write the raw figures, the table and the picture, whole or not at all."""
    from translution.reports.render.vega import png, svg
    from translution.reports.sections.experiment import experiment_markdown, experiment_picture

    with new_folder(out, marker=RESULT, force=force) as folder:
        (folder / RESULT).write_text(result.model_dump_json(indent=2) + "\n", encoding="utf-8")
        text = f"{experiment_markdown(result)}\n![{result.experiment.question}]({PICTURE}.svg)\n"
        (folder / TABLE).write_text(text, encoding="utf-8")
        spec = experiment_picture(result)
        (folder / f"{PICTURE}.svg").write_text(svg(spec), encoding="utf-8")
        (folder / f"{PICTURE}.png").write_bytes(png(spec))


def check_out(out: Path, *, force: bool) -> None:
    """Whether the result will find its place, before minutes are spent on it.

    Raises:
        InputError: if it will not.
        MissingPackageError: if a package that draws the picture is missing.
    """
    with requires_extra("report"):
        import translution.reports.sections.experiment  # noqa: F401
    check_new_folder(out, marker=RESULT, force=force)


@app.command(
    "experiment",
    epilog="Examples: **translution experiment shift** · **translution experiment language --quick --out quick**",
)
def experiment_cli(
    name: Annotated[str, typer.Argument(metavar="NAME", help="shift, ablation, rank, roles or language.")],
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
    """Train small models of every operator to answer one of the paper's questions at desk size."""
    experiment = find_experiment(name)
    out = Path("experiments", name) if out is None else out
    check_out(out, force=force)

    def show(trial: Trial, number: int, count: int) -> None:
        note(f"{number}/{count}: {trial.variant}, {trial.train}, seed {trial.seed}: {trial.seconds:.0f} s")

    result = run_experiment(experiment, quick=quick, seeds=seeds, steps=steps, on_trial=show)
    write_result(result, out, force=force)
    if as_json:
        print_json({"summaries": [row.model_dump() for row in result.summaries()], "seconds": result.seconds})
        return
    from translution.reports.sections.experiment import experiment_cells

    headings, cells = experiment_cells(result)
    console().print(make_table(experiment.question, headings, cells))
    console().print(f"wrote {out}: {RESULT}, {TABLE}, {PICTURE}.svg and .png")
