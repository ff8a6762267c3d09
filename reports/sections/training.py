"""The section on training runs: predicted and measured time, loss, learning rate, gradient norm and throughput."""

from __future__ import annotations

from collections.abc import Sequence

from translution.planner.common import Provenance

from ..charts.training_curves import Curve, Expected, draw_figure
from ..inputs.training_runs import GRADIENT_NORM, LOSS, RATE, SECONDS, THROUGHPUT, TrainingRun
from ..render.document import CellValue, Column, Picture, Section, SectionPart, Table

_FIGURES = {
    "curve": Curve(LOSS, "loss", half=False),
    "training-seconds": Curve(SECONDS, "step time", "seconds", logarithmic=True),
    "training-throughput": Curve(THROUGHPUT, "throughput", "samples per second", logarithmic=True),
    "training-rate": Curve(RATE, "learning rate", digits=".3g"),
    "training-norm": Curve(GRADIENT_NORM, "gradient norm", logarithmic=True),
}
"""What is drawn, by the key of its picture."""


def _expected(run: TrainingRun, column: str) -> Expected | None:
    """Return what the run's plan predicted of a column, if the cluster's rates are known."""
    time = run.plan.time
    if time is None:
        return None
    if column == SECONDS:
        return Expected(run.label, time.likely_s, time.low_s, time.high_s)
    if column == THROUGHPUT:
        batch = run.plan.training.global_batch(run.plan.cluster.world_size)
        return Expected(run.label, time.samples_per_s, batch / time.high_s, batch / time.low_s)
    return None


def _row(run: TrainingRun) -> tuple[CellValue, ...]:
    time, later = run.plan.time, run.later_steps
    seconds, rates = later[SECONDS].dropna(), later[THROUGHPUT].dropna()
    median = None if seconds.empty else float(seconds.median())
    measured = None if median is None else (median, float(seconds.min()), float(seconds.max()))
    losses, accuracies = run.evaluations["loss"].dropna(), run.evaluations["accuracy"].dropna()
    return (
        run.label,
        f"{run.plan.model.name} on {run.plan.cluster.name}",
        int(run.steps["step"].iloc[-1]),
        None if time is None else (time.likely_s, time.low_s, time.high_s),
        measured,
        None if time is None or not median else time.likely_s / median,
        None if rates.empty else float(rates.median()),
        run.last(LOSS),
        None if losses.empty else float(losses.iloc[-1]),
        None if accuracies.empty else f"{accuracies.iloc[-1]:.2%}",
    )


def _table(runs: Sequence[TrainingRun], how: str, made: Provenance | None) -> Table:
    kinds = {
        "steps": "integer", "step, predicted (interval)": "seconds", "step, measured (fastest to slowest)": "seconds",
        "predicted / measured": "ratio", "samples / s": "number", "last loss": "number", "held-out loss": "number",
        "held-out accuracy": "text",
    }  # fmt: skip
    columns = [Column.model_validate({"title": title, "kind": kind}) for title, kind in kinds.items()]
    return Table(
        key="training-table",
        caption="Runs: predicted and measured time of a step (median without the first step), and results",
        columns=(Column(title="run"), Column(title="plan"), *columns),
        rows=tuple(map(_row, runs)),
        how=how,
        made=made,
    )


def training_section(runs: Sequence[TrainingRun], made: Provenance) -> Section:
    """Return the section on runs, with a line for each run in every chart.

    Args:
        runs: at least one run.
        made: provenance of the report; a single run's figures have its own.
    """
    alone = len(runs) == 1
    how, source = ("Measured by", runs[0].made) if alone else ("Drawn by", made)
    pictures: list[SectionPart] = []
    for key, figure in _FIGURES.items():
        expected = [found for run in runs if (found := _expected(run, figure.column)) is not None]
        spec = draw_figure(runs, figure, expected, evaluated=figure.column == LOSS)
        if spec is None:
            continue
        caption = "Mean over all ranks at each step; diamonds: held-out samples." if figure.column == LOSS else ""
        if expected:
            caption = "Lines: measured. Dashed: predicted, with the interval as a band."
        pictures.append(
            Picture(
                key=key,
                caption=caption or f"{figure.axis_title[0].upper()}{figure.axis_title[1:]} of each step.",
                name=f"{figure.title[0].upper()}{figure.title[1:]} of each step",
                spec=spec,
                half=figure.half,
                narrow=True,
                how=how,
                made=source,
            )
        )
    # The table comes after the loss, so that the first picture is seen without scrolling.
    parts = [*pictures[:1], _table(runs, how, source), *pictures[1:]]
    what = f"run {runs[0].label}" if alone else f"{len(runs)} runs"
    return Section(key="training", title=f"Training: {what}", parts=tuple(parts))
