"""The results of an experiment: a section of a report, Markdown, and a chart."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import altair as alt
import pandas as pd

from translution.distributed.experiments import EXPERIMENT_RESULT, ExperimentResult, Summary
from translution.planner.common import InputError, format_count, parse_json

from ..render.document import CellValue, Column, Picture, Section, Table, read_input
from ..render.vega import COLOURS, REST_COLOUR

_PICTURE_WIDTH, _ROW_HEIGHT = 320, 22
_KINDS = {
    "digits-static": "centred",
    "digits-patches": "patches away",
    "digits-shifted": "anywhere",
    "stdlib": "the library's source",
}


def kind_name(kind: str) -> str:
    """Return the display name of a kind of data."""
    return _KINDS.get(kind, kind)


def format_summary(result: ExperimentResult, row: Summary) -> str:
    """Format the mean and, for several seeds, the standard deviation."""
    if result.experiment.metric == "accuracy":
        return f"{row.mean:.1%}" + (f" ± {row.deviation * 100:.1f}" if row.seeds > 1 else "")
    return f"{row.mean:.3f}" + (f" ± {row.deviation:.3f}" if row.seeds > 1 else "")


def experiment_cells(result: ExperimentResult) -> tuple[list[str], list[list[str]]]:
    """Return headings and formatted cells: a row for each variant, a column for each training and test set."""
    summaries = result.summaries()
    columns = list(dict.fromkeys((row.train, row.test) for row in summaries))
    headings = ["model", "parameters"]
    headings += [f"{kind_name(train)} → {kind_name(test)}" for train, test in columns]
    cells = []
    for variant in result.experiment.variants:
        own = {(row.train, row.test): row for row in summaries if row.variant == variant.name}
        first = next(iter(own.values()))
        cells.append(
            [variant.name, format_count(first.parameters), *(format_summary(result, own[key]) for key in columns)]
        )
    return headings, cells


def experiment_markdown(result: ExperimentResult) -> str:
    """Return the results as Markdown, with the command, machine and versions that produced them."""
    experiment, made = result.experiment, result.made
    headings, cells = experiment_cells(result)
    seeds = len({trial.seed for trial in result.trials})
    spread = f"mean ± sample standard deviation over {seeds} seeds" if seeds > 1 else "one seed"
    lines = [f"# {experiment.name}: {experiment.question}", ""]
    if result.quick:
        lines += ["**A quick run with too few steps for meaningful results.**", ""]
    lines += [f"| {' | '.join(headings)} |", f"|---|{'--:|' * (len(headings) - 1)}"]
    lines += [f"| {' | '.join(row)} |" for row in cells]
    versions = ", ".join(f"{name} {version}" for name, version in made.versions.items())
    lines += [
        "",
        f"{experiment.metric.capitalize()} of held-out samples, {spread}; columns: trained on → tested on.",
        f"{result.steps} steps of {result.batch} samples each; {result.seconds:.0f} s in all.",
        f"`{made.command}`, {made.time_utc}, {made.cores} cores of {made.machine}; {versions}.",
    ]
    return "\n".join(lines) + "\n"


def experiment_picture(result: ExperimentResult) -> dict[str, Any]:
    """Return a Vega-Lite specification that shows every trial as a dot and each mean as a bar."""
    names = [variant.name for variant in result.experiment.variants]
    parameters = {trial.variant: format_count(trial.parameters) for trial in result.trials}
    rows = [
        {
            "model": f"{trial.variant} ({parameters[trial.variant]})",
            "test": f"trained {kind_name(trial.train)}, tested {kind_name(test)}",
            "value": result.value(trial, test),
            "seed": trial.seed,
        }
        for trial in result.trials
        for test in trial.losses
    ]
    data = pd.DataFrame(rows)
    accuracy = result.experiment.metric == "accuracy"
    axis = alt.Axis(format="%") if accuracy else alt.Axis()
    order = [f"{name} ({parameters[name]})" for name in names]
    x = alt.X("mean(value):Q", title=result.experiment.metric, axis=axis)
    y = alt.Y("model:N", title=None, sort=order, axis=alt.Axis(labelLimit=0))
    base = alt.Chart(data)
    tooltip = ["model:N", "test:N", alt.Tooltip("value:Q", format=".4f"), "seed:Q"]
    bars = base.mark_bar(color=COLOURS[0], opacity=0.75).encode(x=x, y=y)
    dots = base.mark_point(color=REST_COLOUR, filled=True, size=28, opacity=1).encode(
        x=alt.X("value:Q"), y=y, tooltip=tooltip
    )
    size = {"width": _PICTURE_WIDTH, "height": _ROW_HEIGHT * len(names)}
    tests = list(dict.fromkeys(data["test"]))
    charts = [
        alt.layer(bars, dots).transform_filter(alt.datum.test == test).properties(title=test, **size) for test in tests
    ]
    spec: dict[str, Any] = alt.vconcat(*charts).properties(title=result.experiment.question).to_dict()
    return spec


_RESULT_FILE = "result.json"


def load_results(folder: Path) -> tuple[ExperimentResult, ...]:
    """Read the results of every experiment in a folder, sorted by the name of their folder.

    Raises:
        InputError: if there are none, or one is invalid or incomplete.
    """
    paths = sorted(folder.glob(f"*/{_RESULT_FILE}"))
    if not paths:
        raise InputError(f"--experiments: '{folder}' is not allowed: must hold folders with {_RESULT_FILE}")
    results = []
    for path in paths:
        result = parse_json(EXPERIMENT_RESULT, read_input(path), str(path))
        try:
            result.summaries()
        except (IndexError, KeyError, statistics.StatisticsError):
            raise InputError(f"{path}: trials: must be of every variant, task and test") from None
        results.append(result)
    return tuple(results)


def _table(result: ExperimentResult, summaries: list[Summary]) -> Table:
    """Return the table with a row for each variant and a column for each training and test set."""
    experiment = result.experiment
    tests = list(dict.fromkeys((row.train, row.test) for row in summaries))
    found = {(row.variant, (row.train, row.test)): row for row in summaries}
    rows: list[tuple[CellValue, ...]] = []
    for variant in experiment.variants:
        own = [found[variant.name, test] for test in tests]
        rows.append((variant.name, own[0].parameters, *((row.mean, row.deviation) for row in own)))
    kind = "share" if experiment.metric == "accuracy" else "number"
    columns = [
        Column.model_validate({"title": f"trained {kind_name(train)}, tested {kind_name(test)}", "kind": kind})
        for train, test in tests
    ]
    seeds = max(row.seeds for row in summaries)
    spread = f"mean ± sample standard deviation over {seeds} seeds" if seeds > 1 else "one seed"
    return Table(
        key=f"experiment-{experiment.name}-table",
        caption=f"{experiment.metric[0].upper()}{experiment.metric[1:]} of held-out samples, {spread}",
        columns=(Column(title="model"), Column(title="parameters", kind="count"), *columns),
        rows=tuple(rows),
        how="Measured by",
        made=result.made,
    )


def experiment_section(result: ExperimentResult) -> Section:
    """Return the section of an experiment: a table of means and deviations, and a chart of all trials."""
    experiment, summaries = result.experiment, result.summaries()
    text = [experiment.question]
    if result.quick:
        text.append("A quick run with too few steps for meaningful results.")
    text.append(f"{result.steps} steps of {result.batch} samples each; {result.seconds:.0f} s in all.")
    means = "; ".join(f"{row.variant}, {kind_name(row.test)}: {row.mean:.3f}" for row in summaries)
    chart = Picture(
        key=f"experiment-{experiment.name}",
        caption="Each dot is a trial; the bar is the mean.",
        name=f"Trials of {experiment.name}",
        spec=experiment_picture(result) | {"description": f"{experiment.question} Mean {experiment.metric}: {means}."},
        how="Measured by",
        made=result.made,
    )
    title = f"Experiment: {experiment.name}"
    parts = (_table(result, summaries), chart)
    return Section(key=f"experiment-{experiment.name}-section", title=title, text=tuple(text), parts=parts)
