"""The section on traffic: what ZeRO-3 and relation parallelism send against batch and ranks, and where they cross."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal, TypeAlias

import altair as alt

from translution.planner.analysis import (
    TrafficPoint,
    compared_models,
    crossing_samples,
    row_crossing_samples,
    traffic_points,
)
from translution.planner.common import Provenance
from translution.planner.config import ModelSpec

from ..render.document import CellValue, Column, Picture, Section, SectionPart, Table
from ..render.vega import COLOURS

_Axis: TypeAlias = Literal["batch", "ranks"]
_WIDTH, _HEIGHT = 440, 280
_ZERO3, _RELATION = "ZeRO-3", "relation parallelism"
_TITLES: dict[_Axis, str] = {"batch": "samples per GPU", "ranks": "GPUs"}
_UNITS: dict[_Axis, str] = {"batch": "samples each", "ranks": "GPUs"}
_DASHES = [[1, 0], [5, 3], [2, 2]]
_GROWING_RANKS, _FIXED_BATCHES = (2, 4, 8, 16, 32, 64, 128, 256), (8, 32, 128)


def _other(axis: _Axis) -> _Axis:
    return "ranks" if axis == "batch" else "batch"


def _curve(point: TrafficPoint, axis: _Axis) -> str:
    """Return what is the same along a curve."""
    return f"{getattr(point, _other(axis))} {_UNITS[_other(axis)]}"


def _rows(points: Sequence[TrafficPoint], axis: _Axis) -> list[dict[str, Any]]:
    rows = []
    for point in points:
        for way, size in ((_ZERO3, point.zero3_bytes), (_RELATION, point.relation_bytes)):
            row = {"x": getattr(point, axis), "GB": size / 1e9, "way": way, "curve": _curve(point, axis)}
            rows.append(row | {"size": f"{size / 1e9:.3g} GB"})
    return rows


def _crossings(spec: ModelSpec, points: Sequence[TrafficPoint], axis: _Axis) -> list[dict[str, Any]]:
    """Return the points within the chart where both ways send as much."""
    found = []
    for curve in dict.fromkeys(_curve(point, axis) for point in points):
        own = [point for point in points if _curve(point, axis) == curve]
        for before, after in pairwise(own):
            if before.relation_bytes <= before.zero3_bytes and after.relation_bytes > after.zero3_bytes:
                samples = crossing_samples(spec, before.ranks)
                x = samples / (before.ranks if axis == "batch" else before.batch)
                found.append({"x": x, "GB": before.zero3_bytes / 1e9, "curve": curve, "text": f"{x:,.0f}"})
    return found


def traffic_picture(spec: ModelSpec, points: Sequence[TrafficPoint], axis: _Axis) -> dict[str, Any]:
    """Chart the bytes that a GPU sends in a step, and mark where the two ways send as much.

    Args:
        spec: the model.
        points: both ways at every number of ranks and samples.
        axis: what changes along a curve.

    Returns:
        Vega-Lite specification.
    """
    curves = list(dict.fromkeys(_curve(point, axis) for point in points))
    values = sorted({getattr(point, axis) for point in points})
    x = alt.X(
        "x:Q",
        title=_TITLES[axis],
        scale=alt.Scale(type="log", base=2, nice=False, padding=8),
        axis=alt.Axis(values=values, format="d", labelOverlap=True, grid=False),
    )
    y = alt.Y(
        "GB:Q", title="sent per GPU and step, GB", scale=alt.Scale(type="log"), axis=alt.Axis(format="~g", tickCount=4)
    )
    colours = alt.Scale(domain=[_ZERO3, _RELATION], range=list(COLOURS[:2]))
    colour = alt.Color("way:N", title=None, scale=colours, legend=alt.Legend(orient="top", symbolOpacity=1))
    dashes = alt.Scale(domain=curves, range=_DASHES[: len(curves)])
    dash = alt.StrokeDash("curve:N", title=None, scale=dashes, legend=alt.Legend(orient="bottom"))
    rows = _rows(points, axis)
    base = alt.Chart(alt.InlineData(values=rows)).encode(x=x, y=y, color=colour)
    tooltip = [alt.Tooltip("way:N"), alt.Tooltip("curve:N"), alt.Tooltip("x:Q", title=_TITLES[axis])]
    layers = [
        base.mark_line().encode(strokeDash=dash),
        base.mark_point(filled=True, size=40, opacity=1).encode(detail="curve:N", tooltip=[*tooltip, "size:N"]),
    ]
    crossings = _crossings(spec, points, axis)
    if crossings:
        marks = alt.Chart(alt.InlineData(values=crossings)).encode(x=x, y=y)
        diamond = marks.mark_point(shape="diamond", size=130, strokeWidth=2, color=COLOURS[4], opacity=1)
        layers += [diamond.encode(tooltip=tooltip[1:]), marks.mark_text(dy=18, fontSize=12).encode(text="text:N")]
    title = f"Bytes sent against {_TITLES[axis]}"
    meets = [f"as much at {row['text']} {_TITLES[axis]} with {row['curve']}" for row in crossings]
    ends = [f"{r['way']} with {r['curve']} {r['size']} at {r['x']}" for r in rows if r["x"] in (values[0], values[-1])]
    description = f"{title}, {spec.name}: {'; '.join([*meets, *ends])}."
    chart = alt.LayerChart(layer=layers, width=_WIDTH, height=_HEIGHT, title=title, description=description)
    return dict(chart.to_dict())


def add_traffic(picture: dict[str, Any], spec: ModelSpec) -> dict[str, Any]:
    """Return a picture with the charts of traffic below it; the picture itself if the model has too few relations.

    Args:
        picture: Vega-Lite specification.
        spec: the model; its operator is replaced by full Translution.
    """
    _, _, spec = next(compared_models(spec, ()))
    charts = [traffic_picture(spec, points, axis) for axis, points in _curves(spec).items() if points]
    if not charts:
        return picture
    datasets = {name: rows for chart in (picture, *charts) for name, rows in chart.get("datasets", {}).items()}
    outer = ("$schema", "config", "datasets")
    above, *below = ({key: value for key, value in one.items() if key not in outer} for one in (picture, *charts))
    top = {key: picture[key] for key in outer[:2] if key in picture} | {"datasets": datasets}
    apart = dict.fromkeys(("color", "strokeDash", "x", "y"), "independent")
    description = " ".join(str(chart["description"]) for chart in (picture, *charts) if "description" in chart)
    parts = [above, {"hconcat": below, "resolve": {"scale": apart}}]
    return top | {"vconcat": parts, "resolve": {"scale": apart}, "description": description}


def _curves(spec: ModelSpec) -> dict[_Axis, tuple[TrafficPoint, ...]]:
    """Return the points of both charts."""
    growing = [point for batch in _FIXED_BATCHES for point in traffic_points(spec, _GROWING_RANKS, (batch,))]
    return {"batch": tuple(traffic_points(spec)), "ranks": tuple(growing)}


def _table(spec: ModelSpec, points: Sequence[TrafficPoint], made: Provenance) -> Table:
    ranks = list(dict.fromkeys(point.ranks for point in points))
    sizes = {(point.ranks, point.batch): point for point in points}
    rows: list[tuple[CellValue, ...]] = []
    for batch in dict.fromkeys(point.batch for point in points):
        own = [sizes[count, batch] for count in ranks]
        rows.append((batch, *(size / 1e9 for one in own for size in (one.zero3_bytes, one.relation_bytes))))
    meets = [crossing_samples(spec, count) / count for count in ranks]
    columns = [Column(title=_TITLES["batch"], kind="integer")]
    for count in ranks:
        columns += [Column(title=f"{way}, {count} GPUs", kind="number") for way in (_ZERO3, _RELATION)]
    return Table(
        key="traffic-table",
        caption=f"GB that one GPU sends in a step of {spec.name} in half precision, of tables or instead of them",
        columns=tuple(columns),
        rows=tuple(rows),
        foot=(("as much from", *(cell for meet in meets for cell in (None, f"{meet:,.0f} samples per GPU"))),),
        made=made,
    )


def traffic_markdown(points: Sequence[TrafficPoint]) -> str:
    """Return the bytes of every number of ranks and samples as a Markdown table; empty without points."""
    ranks = list(dict.fromkeys(point.ranks for point in points))
    if not ranks:
        return ""
    heads = [f"{way}, {count} GPUs" for count in ranks for way in (_ZERO3, _RELATION)]
    lines = [f"| GB sent per GPU and step, with samples per GPU | {' | '.join(heads)} |", f"|---|{'--:|' * len(heads)}"]
    for batch in dict.fromkeys(point.batch for point in points):
        own = [point for point in points if point.batch == batch]
        sizes = [f"{size / 1e9:.3g}" for point in own for size in (point.zero3_bytes, point.relation_bytes)]
        lines.append(f"| {batch} | {' | '.join(sizes)} |")
    return "\n" + "\n".join(lines) + "\n"


def traffic_section(spec: ModelSpec, made: Provenance) -> Section | None:
    """Return the section on the bytes per step of ZeRO-3 and of relation parallelism, and where they cross.

    Args:
        spec: the model; its operator is replaced by full Translution.
        made: provenance of the values.

    Returns:
        The section; None if the model has fewer relations than the smallest number of ranks.
    """
    _, _, spec = next(compared_models(spec, ()))
    curves = _curves(spec)
    ranks = list(dict.fromkeys(point.ranks for point in curves["batch"]))
    if not ranks:
        return None
    both = " and ".join(f"{crossing_samples(spec, count):,.0f} on {count} GPUs" for count in ranks)
    text = (
        "Under ZeRO-3 every GPU receives every table twice a step, and sends the gradients once, whatever the batch. "
        "Under relation parallelism tables stay where they are: tokens, logits and attention weights travel instead. "
        f"Tokens alone are as much as the tables at {row_crossing_samples(spec):,.0f} samples of a group and step. "
        "That is 9·R·C / (5·N) for full Translution with all roles, R relations, N tokens and width C. With logits and "
        f"weights it is {both}. Parameters other than tables are not counted."
    )
    captions: dict[_Axis, str] = {
        "batch": f"Bytes that one GPU sends in a step of {spec.name} against its samples. A diamond marks where both "
        "send as much.",
        "ranks": f"The same against the number of GPUs, which all share out the relations of {spec.name}.",
    }
    pictures = tuple(
        Picture(
            key=f"traffic-{axis}",
            caption=captions[axis],
            name=f"Bytes sent against {_TITLES[axis]}",
            spec=traffic_picture(spec, points, axis),
            half=True,
            made=made,
        )
        for axis, points in curves.items()
    )
    title = "Traffic of ZeRO-3 and of relation parallelism"
    parts: tuple[SectionPart, ...] = (*pictures, _table(spec, curves["batch"], made))
    return Section(key="traffic-section", title=title, text=(text,), parts=parts)
