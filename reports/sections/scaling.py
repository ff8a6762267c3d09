"""The section on scaling: memory per rank and step time against width, tokens, layers and nodes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import altair as alt

from translution.planner.analysis import GROWTH_AXES, GrowthAxis, GrowthPoint, PlanPoint
from translution.planner.common import GIB, Provenance, format_bytes
from translution.planner.hardware import ClusterSpec

from ..render.document import Column, Picture, Section, SectionPart, Table, format_value
from ..render.vega import COLOURS
from .model_costs import TIER_COLUMNS, tier_cells

_AXIS_TITLES: dict[GrowthAxis, str] = {
    "width": "model width", "tokens": "tokens per sample", "depth": "layers", "nodes": "nodes",
}  # fmt: skip
_WIDTH, _HEIGHT = 440, 280
_AXIS = alt.Axis(format="~g", tickCount=4)
_DEVICE, _HOST = "device", "host, pageable and pinned"


def _text(point: PlanPoint) -> str:
    return point.plan if point.plan is not None else f"nothing fits: {point.reason}"


def _memory_rows(points: Iterable[GrowthPoint]) -> list[dict[str, Any]]:
    rows = []
    for point in points:
        best = point.best
        if best.device_bytes is None or best.host_bytes is None or best.pinned_bytes is None:
            continue
        for tier, size in ((_DEVICE, best.device_bytes), (_HOST, best.host_bytes + best.pinned_bytes)):
            row = {"x": point.value, "operator": best.operator, "tier": tier, "y": size / GIB}
            rows.append(row | {"size": format_bytes(size), "plan": _text(best)})
    return rows


def _time_rows(points: Iterable[GrowthPoint]) -> list[dict[str, Any]]:
    rows = []
    for point in points:
        best = point.best
        if best.likely_s is None:
            continue
        text = format_value((best.likely_s, best.low_s or 0.0, best.high_s or 0.0), "seconds")
        row = {"x": point.value, "operator": best.operator, "y": best.likely_s, "low": best.low_s, "high": best.high_s}
        rows.append(row | {"size": text, "plan": _text(best)})
    return rows


def _missing(points: Iterable[GrowthPoint]) -> list[dict[str, Any]]:
    return [
        {"x": point.value, "operator": point.best.operator, "plan": _text(point.best)}
        for point in points
        if point.best.plan is None
    ]


def _chart(
    rows: Sequence[dict[str, Any]], points: Sequence[GrowthPoint], axis: GrowthAxis, y: str, layers: list[alt.Chart]
) -> dict[str, Any]:
    """Return a chart against one axis: the given layers, and a cross where nothing fits."""
    operators = list(dict.fromkeys(point.best.operator for point in points))
    scale = alt.Scale(domain=operators, range=list(COLOURS[: len(operators)]))
    colour = alt.Color(
        "operator:N", title=None, scale=scale, legend=alt.Legend(orient="top", columns=3, symbolOpacity=1)
    )
    values = sorted({point.value for point in points})
    x = alt.X(
        "x:Q",
        title=_AXIS_TITLES[axis],
        scale=alt.Scale(type="log", base=2, nice=False, padding=8),
        axis=alt.Axis(values=values, format="d", labelOverlap=True, grid=False),
    )
    absent = _missing(points)
    crosses = (
        alt.Chart(alt.InlineData(values=absent))
        .mark_point(shape="cross", angle=45, filled=True, size=110, opacity=1)
        .encode(x=x, y=alt.value(8), color=colour, tooltip=[alt.Tooltip("operator:N"), alt.Tooltip("plan:N")])
    )
    drawn = [layer.encode(x=x, color=colour) for layer in layers]
    title = f"{y} against {_AXIS_TITLES[axis]}"
    ends = [f"{row['operator']} {row['size']} at {row['x']}" for row in rows if row["x"] in (values[0], values[-1])]
    none = [f"{row['operator']} does not fit at {row['x']}" for row in absent]
    return dict(
        alt.LayerChart(
            layer=[*drawn, *([crosses] if absent else [])],
            width=_WIDTH,
            height=_HEIGHT,
            title=title,
            description=f"{title}: {'; '.join([*ends, *none])}.",
        ).to_dict()
    )


def _tooltip(axis: GrowthAxis, title: str) -> list[alt.Tooltip]:
    return [
        alt.Tooltip("operator:N"),
        alt.Tooltip("x:Q", title=_AXIS_TITLES[axis]),
        alt.Tooltip("size:N", title=title),
        alt.Tooltip("plan:N"),
    ]


def _memory(points: Sequence[GrowthPoint], axis: GrowthAxis) -> dict[str, Any]:
    rows = _memory_rows(points)
    y = alt.Y("y:Q", title="peak per rank, GiB", scale=alt.Scale(type="log"), axis=_AXIS)
    dash = alt.StrokeDash("tier:N", scale=alt.Scale(domain=[_DEVICE, _HOST], range=[[1, 0], [4, 3]]), legend=None)
    base = alt.Chart(alt.InlineData(values=rows)).encode(y=y)
    dots = base.mark_point(filled=True, size=45, opacity=1).encode(
        detail="tier:N", tooltip=[*_tooltip(axis, "memory"), alt.Tooltip("tier:N")]
    )
    return _chart(rows, points, axis, "Memory", [base.mark_line().encode(strokeDash=dash), dots])


def _time(points: Sequence[GrowthPoint], axis: GrowthAxis) -> dict[str, Any]:
    rows = _time_rows(points)
    y = alt.Y("y:Q", title="step time, seconds", scale=alt.Scale(type="log"), axis=_AXIS)
    base = alt.Chart(alt.InlineData(values=rows))
    band = base.mark_area(opacity=0.2, strokeWidth=0).encode(
        y=alt.Y("low:Q", title="step time, seconds", scale=alt.Scale(type="log"), axis=_AXIS), y2="high:Q"
    )
    dots = base.mark_point(filled=True, size=45, opacity=1).encode(y=y, tooltip=_tooltip(axis, "step"))
    return _chart(rows, points, axis, "Time", [band, base.mark_line().encode(y=y), dots])


def _pictures(points: Sequence[GrowthPoint], axis: GrowthAxis, made: Provenance) -> list[SectionPart]:
    cross = " A cross marks a size at which nothing fits." if _missing(points) else ""
    title = _AXIS_TITLES[axis]
    return [
        Picture(
            key=f"scaling-{axis}-memory",
            heading=f"{title[0].upper()}{title[1:]}",
            caption=f"Peak memory per rank of the best plan against {title}. Solid lines: device memory; dashed lines: "
            f"host memory, pageable and pinned.{cross}",
            name=f"Memory against {title}",
            spec=_memory(points, axis),
            half=True,
            made=made,
        ),
        Picture(
            key=f"scaling-{axis}-time",
            caption=f"Predicted step time of the best plan, with its interval, against {title}.{cross}",
            name=f"Time against {title}",
            spec=_time(points, axis),
            half=True,
            made=made,
        ),
    ]


def scaling_section(
    points: Sequence[GrowthPoint], name: str, cluster: ClusterSpec, precision: str, made: Provenance
) -> Section:
    """Return the section with the best plan at every size, as charts and as a table.

    Args:
        points: result of `translution.planner.analysis.growth.growth`.
        name: name of the base model.
        cluster: cluster of the base model.
        precision: training precision.
        made: provenance of the values.
    """
    parts: list[SectionPart] = []
    for axis in GROWTH_AXES:
        own = [point for point in points if point.axis == axis]
        if own:
            parts += _pictures(own, axis, made)
    columns = (Column(title="axis"), Column(title="size", kind="integer"), Column(title="operator"), *TIER_COLUMNS)
    rows = tuple((_AXIS_TITLES[p.axis], p.value, p.best.operator, *tier_cells(p.best)) for p in points)
    parts.append(
        Table(
            key="scaling-table",
            heading="All points",
            caption=f"Best plan of {name} on {cluster.name}, varying one size at a time",
            columns=columns,
            rows=rows,
            chosen_by=0,
            made=made,
        )
    )
    text = (
        f"Variations of {name} on {cluster.name} in {precision}, with 8 samples per rank and step. Every point shows "
        "the plan that translution plan would choose. The choice may change from one size to the next, for example "
        "from ZeRO-2 to ZeRO-3, so memory does not always grow. A step takes at least the time that Python needs to "
        "launch its operations, so the times of small models are nearly constant."
    )
    return Section(key="scaling", title="How memory and time grow", text=(text,), parts=tuple(parts))
