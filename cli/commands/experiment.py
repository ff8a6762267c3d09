"""``translution experiment``."""

from __future__ import annotations

from pathlib import Path

from translution.distributed.experiments.definitions import find_experiment
from translution.distributed.experiments.runner import ExperimentResult, Trial, run_experiment
from translution.planner.common.errors import MissingPackageError
from translution.planner.common.files import check_new_folder, new_folder

from ..output import console, note, print_json, table

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
        MissingPackageError: without what draws the picture.
    """
    try:
        import translution.reports.sections.experiment  # noqa: F401
    except ModuleNotFoundError as error:
        raise MissingPackageError(f"{error.name} is missing: pip install 'translution-scale[report]'") from None
    check_new_folder(out, marker=RESULT, force=force)


def run_and_show(
    name: str, out: Path | None, *, quick: bool, seeds: int | None, steps: int | None, force: bool, as_json: bool
) -> None:
    """Run an experiment and show what it found.

    Args:
        name: of the experiment.
        out: the folder to write, if not ``experiments/NAME``.
        quick: few steps and one seed.
        seeds: how many, if not the experiment's.
        steps: how many, if not the experiment's.
        force: replace an earlier result.
        as_json: print JSON instead of a table.
    """
    experiment = find_experiment(name)
    out = Path("experiments", name) if out is None else out
    check_out(out, force=force)
    words = [f"translution experiment {name}", *(["--quick"] if quick else [])]
    words += [f"--{flag} {value}" for flag, value in (("seeds", seeds), ("steps", steps)) if value is not None]

    def show(trial: Trial, number: int, count: int) -> None:
        note(f"{number}/{count}: {trial.variant}, {trial.train}, seed {trial.seed}: {trial.seconds:.0f} s")

    result = run_experiment(experiment, quick=quick, seeds=seeds, steps=steps, command=" ".join(words), on_trial=show)
    write_result(result, out, force=force)
    if as_json:
        print_json({"summaries": [row.model_dump() for row in result.summaries()], "seconds": result.seconds})
        return
    from translution.reports.sections.experiment import experiment_cells

    headings, cells = experiment_cells(result)
    console().print(table(experiment.question, headings, cells))
    console().print(f"wrote {out}: {RESULT}, {TABLE}, {PICTURE}.svg and .png")
