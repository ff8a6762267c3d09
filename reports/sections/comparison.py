"""Comparisons of operators as tables and charts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import altair as alt
import pandas as pd

from translution.planner.analysis import AXES, ComparisonRow, ScalePoint, Threshold
from translution.planner.common import GIB, Provenance, format_bytes, format_count, format_flops

from ..render.document import CellValue, Column, Picture, Section, SectionPart, Table
from ..render.vega import COLOURS

_PICTURE_WIDTH, _PICTURE_HEIGHT = 260, 240
_HEADINGS = (
    "model", "operator", "parameters", "training / sample", "states", "saved / sample", "unsharded minimum",
    "smallest cluster", "smallest with offload", "time / sample",
)  # fmt: skip
_AXIS_TITLES = {"width": "model width", "tokens": "tokens per sample", "depth": "layers"}


def comparison_frame(rows: Iterable[ComparisonRow]) -> pd.DataFrame:
    """Return one row per model and operator; sizes in bytes, times in seconds."""
    result: pd.DataFrame = pd.DataFrame([row.model_dump() for row in rows])
    return result


def _cells(row: ComparisonRow) -> tuple[str, ...]:
    """Return formatted cells in the order of `_HEADINGS`."""
    rank = "" if row.alpha_rank is None else f", c1 = c2 = {row.alpha_rank}"
    return (
        row.model,
        row.operator + rank,
        format_count(row.parameters),
        format_flops(row.training_flops),
        format_bytes(row.states_bytes),
        format_bytes(row.saved_bytes),
        format_bytes(row.floor_bytes),
        row.cluster or "none",
        row.offload_cluster or "none",
        "" if row.sample_s is None else f"{row.sample_s * 1e3:.3g} ms",
    )


def comparison_markdown(rows: Sequence[ComparisonRow], limits: Sequence[Threshold]) -> str:
    """Return the comparison and the thresholds as Markdown tables."""
    lines = [f"| {' | '.join(_HEADINGS)} |", f"|---|---|{'--:|' * (len(_HEADINGS) - 2)}"]
    lines += [f"| {' | '.join(cells)} |" for cells in map(_cells, rows)]
    if limits:
        lines += ["", *_threshold_lines(limits)]
    return "\n".join(lines) + "\n"


def _threshold_lines(limits: Sequence[Threshold]) -> list[str]:
    """Return the largest sizes at which full Translution fits on a number of nodes, as lines of a Markdown table."""
    nodes = list(dict.fromkeys(limit.nodes for limit in limits))
    lines = [f"| full Translution up to | {' | '.join(f'{count} node(s)' for count in nodes)} |"]
    lines.append(f"|---|{'--:|' * len(nodes)}")
    for axis in AXES:
        cells = [str(limit.largest or "none") for limit in limits if limit.axis == axis]
        if cells:
            lines.append(f"| {_AXIS_TITLES[axis]} | {' | '.join(cells)} |")
    return lines


def _rules(limits: Iterable[Threshold]) -> list[dict[str, Any]]:
    """Return a row for each largest size, with the numbers of nodes that have it."""
    nodes: dict[tuple[str, int], list[str]] = {}
    for limit in limits:
        if limit.largest:
            nodes.setdefault((limit.axis, limit.largest), []).append(str(limit.nodes))
    return [{"axis": axis, "largest": size, "label": ", ".join(names)} for (axis, size), names in nodes.items()]


def comparison_picture(points: Iterable[ScalePoint], limits: Sequence[Threshold], title: str) -> dict[str, Any]:
    """Chart memory against width, tokens and depth, with rules at the largest full Translution on 1, 2 and 8 nodes.

    Args:
        points: sizes of one model.
        limits: thresholds of the same model.
        title: title of the chart.

    Returns:
        Vega-Lite specification.
    """
    data = pd.DataFrame([point.model_dump(by_alias=False) for point in points])
    data["GiB"] = (data["states_bytes"] + data["saved_bytes"]) / GIB
    ends = pd.DataFrame(_rules(limits))
    operators = list(dict.fromkeys(data["operator"]))
    colours = alt.Scale(domain=operators, range=list(COLOURS[: len(operators)]))
    charts = []
    for axis in AXES:
        own = data[data["axis"] == axis]
        scale = alt.Scale(type="log", nice=False)
        lines = (
            alt.Chart(own)
            .mark_line(point=True)
            .encode(
                x=alt.X("value:Q", title=_AXIS_TITLES[axis], scale=scale, axis=alt.Axis(labelSeparation=8)),
                y=alt.Y("GiB:Q", title="states and one sample's activations, GiB", scale=scale),
                color=alt.Color("operator:N", title=None, scale=colours, legend=alt.Legend(orient="bottom")),
                tooltip=[
                    "operator:N",
                    alt.Tooltip("value:Q", title=_AXIS_TITLES[axis]),
                    alt.Tooltip("GiB:Q", format=".4g"),
                ],
            )
        )
        layers = [lines]
        if not ends.empty and (ends["axis"] == axis).any():
            rules = alt.Chart(ends[ends["axis"] == axis])
            layers.append(rules.mark_rule(strokeDash=[4, 3], opacity=0.6).encode(x="largest:Q"))
            layers.append(
                rules.mark_text(baseline="bottom", dy=-3).encode(x="largest:Q", y=alt.value(0), text="label:N")
            )
        charts.append(alt.layer(*layers).properties(width=_PICTURE_WIDTH, height=_PICTURE_HEIGHT))
    spec: dict[str, Any] = alt.hconcat(*charts).properties(title=title).to_dict()
    return spec


_COLUMNS = (
    Column(title="model"),
    Column(title="operator"),
    Column(title="c1 = c2", kind="integer"),
    Column(title="parameters", kind="count"),
    Column(title="training / sample", kind="flops"),
    Column(title="states", kind="bytes"),
    Column(title="saved / sample", kind="bytes"),
    Column(title="unsharded minimum", kind="bytes"),
    Column(title="ranks", kind="integer"),
    Column(title="smallest cluster"),
    Column(title="smallest with offload"),
    Column(title="time / sample", kind="seconds"),
)


def _row(row: ComparisonRow) -> tuple[CellValue, ...]:
    sizes = row.states_bytes, row.saved_bytes, row.floor_bytes
    places = row.ranks, row.cluster or "none", row.offload_cluster or "none"
    return (
        row.model, row.operator, row.alpha_rank, row.parameters, row.training_flops, *sizes, *places, row.sample_s,
    )  # fmt: skip


def _limits(limits: Sequence[Threshold], model: str, made: Provenance) -> Table:
    nodes = list(dict.fromkeys(limit.nodes for limit in limits))
    rows: list[tuple[CellValue, ...]] = []
    for axis in dict.fromkeys(limit.axis for limit in limits):
        found = {limit.nodes: limit.largest for limit in limits if limit.axis == axis}
        rows.append((_AXIS_TITLES[axis], *(found.get(count) or "none" for count in nodes)))
    columns = (Column(title="full Translution up to"), *(Column(title=f"{n} node(s)", kind="integer") for n in nodes))
    caption = f"Largest size of {model} that fits without offload on a number of nodes, varying one size at a time"
    return Table(key="limits-table", caption=caption, columns=columns, rows=tuple(rows), sortable=False, made=made)


def comparison_section(
    rows: Sequence[ComparisonRow],
    limits: Sequence[Threshold],
    points: Sequence[ScalePoint],
    gpu: str,
    made: Provenance,
) -> Section:
    """Return the section on the costs of every operator, the smallest cluster that trains it, and the time there.

    Args:
        rows: comparison of all models.
        limits: thresholds of the first model; may be empty.
        points: sizes of the first model for the chart; may be empty.
        gpu: GPU of the clusters.
        made: provenance of the values.
    """
    parts: list[SectionPart] = [
        Table(
            key="comparison-table",
            caption=f"Costs of each model, and the smallest cluster of {gpu} that trains it",
            columns=_COLUMNS,
            rows=tuple(map(_row, rows)),
            chosen_by=0,
            made=made,
        )
    ]
    first = rows[0].model
    if points:
        spec = comparison_picture(points, limits, f"{first}: memory over all ranks")
        largest = [p for p in points if p.value == max(q.value for q in points if q.axis == p.axis)]
        summary = "; ".join(f"{p.operator} {p.states_bytes:,} bytes of states at {p.value} ({p.axis})" for p in largest)
        parts.append(
            Picture(
                key="comparison",
                caption=f"Model states and the activations of one sample of {first} over all ranks, against width, "
                "tokens and layers. A dashed line marks the largest full Translution that fits on the number of nodes "
                "above it.",
                name="Memory over all ranks",
                spec=spec | {"description": f"Memory over all ranks: {summary}."},
                made=made,
            )
        )
    if limits:
        parts.append(_limits(limits, first, made))
    text = (
        "States are the parameters, gradients, master copy and optimizer moments over all ranks. The unsharded minimum "
        "is the memory that ZeRO-3 needs on every rank, however many ranks there are. Time is predicted, not measured, "
        "for the best plan without offload on the smallest cluster."
    )
    return Section(key="comparison-section", title=f"Operators on {gpu}", text=(text,), parts=tuple(parts))
