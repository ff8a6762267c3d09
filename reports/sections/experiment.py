"""The results of an experiment: a section of a report, Markdown, and a chart."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any, Literal

import altair as alt

from translution.distributed.experiments import EXPERIMENT_RESULT, ExperimentResult, Summary
from translution.planner.common import InputError, format_count, parse_json
from translution.planner.config import GptSpec

from ..charts.memory_timeline import CHART_WIDTH
from ..render.document import CellValue, Column, Picture, Section, Table, read_input
from ..render.vega import COLOURS

_FACET_WIDTH, _ROW_HEIGHT = 320, 22
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


def chance_value(result: ExperimentResult) -> float:
    """Return the metric of a model that knows nothing: one over the classes, or the bits of an equally likely token."""
    model = result.experiment.variants[0].model
    if isinstance(model, GptSpec):
        return math.log2(model.vocabulary)
    return 1 / model.classes


def _trial_rows(result: ExperimentResult) -> list[dict[str, Any]]:
    """Return a row per trial and test set, with the mean over the seeds."""
    means: dict[tuple[str, str, str], float] = {
        (row.variant, row.train, row.test): row.mean for row in result.summaries()
    }
    rows: list[dict[str, Any]] = [
        {
            "model": f"{trial.variant} ({format_count(trial.parameters)})",
            "test": _test_name(trial.train, test),
            "value": result.value(trial, test),
            "mean": means[trial.variant, trial.train, test],
            "seed": trial.seed,
        }
        for trial in result.trials
        for test in trial.losses
    ]
    seen: set[str] = set()
    for row in rows:
        # One row of each pair of training and test set carries the chance line.
        row["first"] = row["test"] not in seen
        seen.add(str(row["test"]))
    return rows


def _test_name(train: str, test: str) -> str:
    return f"trained {kind_name(train)}, tested {kind_name(test)}"


def experiment_picture(result: ExperimentResult) -> dict[str, Any]:
    """Return a Vega-Lite specification that shows every trial as a dot and each mean as a bar.

    All pairs of training and test set have the same axes, and a dashed line where a model that knows nothing is.
    """
    metric, rows = result.experiment.metric, _trial_rows(result)
    is_accuracy = metric == "accuracy"
    chance = chance_value(result)
    highest = 1.0 if is_accuracy else 1.05 * max(chance, *(row["value"] for row in rows))
    chance_text = f"chance {chance:.0%}" if is_accuracy else f"chance {chance:.3g}"
    scale = alt.Scale(domain=[0, highest], nice=False)
    axis = alt.Axis(format="%", tickCount=5) if is_accuracy else alt.Axis(tickCount=5)
    x, of_mean = (alt.X(f"{name}:Q", title=metric, axis=axis, scale=scale, stack=None) for name in ("value", "mean"))
    order = [variant.name for variant in result.experiment.variants]
    models = sorted({row["model"] for row in rows}, key=lambda model: order.index(model.rpartition(" (")[0]))
    y = alt.Y("model:N", title=None, scale=alt.Scale(domain=models), axis=alt.Axis(labelLimit=0))
    tooltip = ["model:N", "test:N", alt.Tooltip("value:Q", format=".4f"), alt.Tooltip("mean:Q", format=".4f"), "seed:Q"]
    data = alt.InlineData(values=rows)
    base = alt.Chart().encode(y=y)
    # Each seed has a bar of the same mean: only one of them is drawn.
    first = min(row["seed"] for row in rows)
    bars = base.transform_filter(f"datum.seed == {first}").mark_bar(color=COLOURS[0], opacity=0.75).encode(x=of_mean)
    dots = base.mark_point(color=COLOURS[1], filled=True, size=28, opacity=1).encode(x=x, tooltip=tooltip)
    at_chance = alt.Chart().transform_filter("datum.first").encode(x=alt.datum(chance))
    rule = at_chance.mark_rule(strokeDash=[4, 3], strokeWidth=1.5)
    side: Literal["left", "right"] = "right" if chance > highest / 2 else "left"
    shift = -3 if side == "right" else 3
    name = at_chance.mark_text(align=side, baseline="bottom", dx=shift, dy=-3).encode(y=alt.value(0))
    layers = [bars, dots, rule, name.encode(text=alt.value(chance_text))]
    width = _FACET_WIDTH if len({row["test"] for row in rows}) > 1 else CHART_WIDTH
    chart = alt.LayerChart(layer=layers, width=width, height=_ROW_HEIGHT * len(models))
    tests = list(dict.fromkeys(row["test"] for row in rows))
    title = alt.TitleParams(result.experiment.question, offset=24)
    if len(tests) == 1:
        return dict(chart.properties(title=title, data=data).to_dict())
    header = alt.Header(labelPadding=20, labelFontWeight="bold", labelAnchor="start", labelFontSize=12)
    facet = alt.Facet("test:N", title=None, sort=tests, header=header)
    return dict(chart.facet(facet=facet, columns=2, data=data).properties(title=title).to_dict())


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
    columns = [Column.model_validate({"title": _test_name(train, test), "kind": kind}) for train, test in tests]
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


def _chance_words(result: ExperimentResult) -> str:
    """Return what a model that knows nothing reaches, in words."""
    chance = chance_value(result)
    if result.experiment.metric == "accuracy":
        return f"{chance:.0%} for a guess among {round(1 / chance)} classes"
    return f"{chance:.3g} bits if every byte is equally likely"


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
        caption=f"Each dot is a trial; the bar is the mean. Dashed: chance, {_chance_words(result)}.",
        name=f"Trials of {experiment.name}",
        spec=experiment_picture(result) | {"description": f"{experiment.question} Mean {experiment.metric}: {means}."},
        how="Measured by",
        made=result.made,
    )
    title = f"Experiment: {experiment.name}"
    parts = (_table(result, summaries), chart)
    return Section(key=f"experiment-{experiment.name}-section", title=title, text=tuple(text), parts=parts)
