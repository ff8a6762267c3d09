"""Sections of what ``translution experiment`` has found."""

from __future__ import annotations

import statistics
from pathlib import Path

from translution.distributed.experiment import RESULT, ExperimentResult, Summary
from translution.planner.errors import InputError
from translution.planner.schema import parse_json

from .document import Column, Picture, Section, Table, Value, read
from .experiment import kind_name, picture

RESULT_FILE = "result.json"


def load_results(folder: Path) -> tuple[ExperimentResult, ...]:
    """Every experiment whose folder lies in this one, by name.

    Raises:
        InputError: if there is none, or one is damaged.
    """
    paths = sorted(folder.glob(f"*/{RESULT_FILE}"))
    if not paths:
        raise InputError(f"--experiments: '{folder}' is not allowed: must hold folders with {RESULT_FILE}")
    results = []
    for path in paths:
        result = parse_json(RESULT, read(path), str(path))
        try:
            result.summaries()
        except (IndexError, KeyError, statistics.StatisticsError):
            raise InputError(f"{path}: trials: must be of every variant, task and test") from None
        results.append(result)
    return tuple(results)


def _table(result: ExperimentResult, summaries: list[Summary]) -> Table:
    """A row for each variant, a column for each task and test."""
    asked, key = result.experiment, result.experiment.name
    tests = list(dict.fromkeys((row.train, row.test) for row in summaries))
    found = {(row.variant, (row.train, row.test)): row for row in summaries}
    rows: list[tuple[Value, ...]] = []
    for variant in asked.variants:
        own = [found[variant.name, test] for test in tests]
        rows.append((variant.name, own[0].parameters, *((row.mean, row.deviation) for row in own)))
    kind = "share" if asked.metric == "accuracy" else "number"
    columns = [
        Column.model_validate({"title": f"trained {kind_name(train)}, tested {kind_name(test)}", "kind": kind})
        for train, test in tests
    ]
    seeds = max(row.seeds for row in summaries)
    spread = f"mean ± sample standard deviation over {seeds} seeds" if seeds > 1 else "one seed"
    return Table(
        key=f"experiment-{key}-table",
        caption=f"{asked.metric[0].upper()}{asked.metric[1:]} of held-out samples, {spread}",
        columns=(Column(title="model"), Column(title="parameters", kind="count"), *columns),
        rows=tuple(rows),
        how="Measured by",
        made=result.made,
    )


def experiment_section(result: ExperimentResult) -> Section:
    """A table of means and spreads, and every trial as a picture.

    Args:
        result: of one experiment.
    """
    asked, summaries = result.experiment, result.summaries()
    text = [asked.question]
    if result.quick:
        text.append("A quick run, of too few steps to mean anything.")
    text.append(f"{result.steps} steps of {result.batch} samples each; {result.seconds:.0f} s in all.")
    means = "; ".join(f"{row.variant}, {kind_name(row.test)}: {row.mean:.3f}" for row in summaries)
    chart = Picture(
        key=f"experiment-{asked.name}",
        caption="Every trial as a dot, the mean as a bar.",
        name=f"Trials of {asked.name}",
        spec=picture(result) | {"description": f"{asked.question} Mean {asked.metric}: {means}."},
        how="Measured by",
        made=result.made,
    )
    title = f"Experiment: {asked.name}"
    parts = (_table(result, summaries), chart)
    return Section(key=f"experiment-{asked.name}-section", title=title, text=tuple(text), parts=parts)
