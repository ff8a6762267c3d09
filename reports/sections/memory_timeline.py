"""The picture of a timeline: live bytes by category, stacked, over the events of a step.

The axis counts allocations and releases, not seconds, as memory viewers do; phases of few events are
widened, so that each can be seen.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import altair as alt

from translution.planner.common.units import GIB, KIB, MIB, TIB, format_bytes
from translution.planner.memory.timeline import Timeline, TimelinePoint

from ..render.vega import COLOURS, REST_COLOUR

CHART_WIDTH, CHART_HEIGHT = 860, 340
_UNITS = ((TIB, "TiB"), (GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB"))
_LEAST_SHARE = 0.08
"""Of the axis, for a phase."""
_LABEL_SHARE = 0.05
"""A phase with less has no label; the tooltip names it."""
_ONE_LINE_SHARE = 0.2
"""A phase with less has each word of its name on a line of its own."""
_LINE_HEIGHT = 14
_SIGHT = 2.0
"""A tier's capacity is drawn where it is at most so many times the peak."""
_SHADE = "#808080"


@dataclass(frozen=True, slots=True)
class _Series:
    """What is drawn of a timeline: the largest categories, and the others summed up."""

    names: tuple[str, ...]
    sizes: tuple[tuple[int, ...], ...]
    """Of every point, in the order of the names."""
    colours: tuple[str, ...]

    @property
    def keys(self) -> list[str]:
        """Names of the data's columns; categories may be called anything."""
        return [f"c{number}" for number in range(len(self.names))]


def describe_point(point: TimelinePoint) -> str:
    """Where in the step a point is, in words."""
    if not point.site or point.phase in point.site:
        return point.site or point.phase or "throughout"
    return f"{point.site}, {point.phase}"


def describe_timeline(timeline: Timeline, title: str) -> str:
    """What the picture shows, for those who do not see it."""
    sizes = zip(timeline.categories, timeline.peak.live_bytes, strict=True)
    parts = ", ".join(f"{name} {format_bytes(size)}" for name, size in sizes if size)
    phases = ", ".join(f"{phase.name} {format_bytes(phase.peak_bytes)}" for phase in timeline.phases)
    return (
        f"{title}. Stacked areas: live bytes over {timeline.event_count:,} allocations and releases. Peak "
        f"{format_bytes(timeline.peak_bytes)} at {describe_point(timeline.peak)}: {parts}. Peak of each phase: {phases}."
    )


def assign_colours(charts: Iterable[Sequence[str]]) -> list[dict[str, str]]:
    """A colour for each name of each chart: different within a chart, the same in all where that goes.

    Args:
        charts: the names in each, at most as many as there are colours.
    """
    known: dict[str, str] = {}
    result = []
    for names in charts:
        mine: dict[str, str] = {}
        for name in names:
            if name in known and known[name] not in mine.values():
                mine[name] = known[name]
        for name in names:
            if name not in mine:
                mine[name] = next(colour for colour in COLOURS if colour not in mine.values())
                known.setdefault(name, mine[name])
        result.append(mine)
    return result


def _series(timeline: Timeline, colours: Mapping[str, str]) -> _Series:
    kept = len(COLOURS)
    names, others = timeline.categories[:kept], timeline.categories[kept:]
    sizes = [point.live_bytes[:kept] for point in timeline.points]
    shades = tuple(colours[name] for name in names)
    if others:
        names, shades = (*names, f"{len(others)} others"), (*shades, REST_COLOUR)
        rest = [sum(point.live_bytes[kept:]) for point in timeline.points]
        sizes = [(*row, size) for row, size in zip(sizes, rest, strict=True)]
    return _Series(names, tuple(sizes), shades)


def _axis(timeline: Timeline) -> Callable[[int], float]:
    """From events to positions between 0 and 1."""
    if not timeline.phases:
        return float
    least = min(_LEAST_SHARE, 0.5 / len(timeline.phases))
    shares = [max(phase.event_count / timeline.event_count, least) for phase in timeline.phases]
    ends = [end / sum(shares) for end in accumulate(shares)]
    starts = [phase.first_event for phase in timeline.phases]

    def position(event: int) -> float:
        number = bisect_right(starts, event) - 1
        begin = ends[number - 1] if number else 0.0
        part = (event - starts[number]) / timeline.phases[number].event_count
        return round(begin + part * (ends[number] - begin), 5)

    return position


def _axis_title(timeline: Timeline) -> str:
    widened = any(phase.event_count < _LEAST_SHARE * timeline.event_count for phase in timeline.phases)
    text = f"{timeline.event_count:,} allocations and releases, in order"
    return f"{text}; phases of few are widened" if widened else text


def _rows(timeline: Timeline, series: _Series, position: Callable[[int], float]) -> list[dict[str, Any]]:
    begins = [position(point.first_event) for point in timeline.points]
    rows: list[dict[str, Any]] = [
        {"x": begin, "x2": end, "phase": point.phase, "moment": point.site, "all": point.total_bytes}
        | dict(zip(series.keys, sizes, strict=True))
        for begin, end, point, sizes in zip(begins, [*begins[1:], 1.0], timeline.points, series.sizes, strict=True)
    ]
    # Steps end where the last point is.
    return [*rows, rows[-1] | {"x": 1.0}]


def _areas(data: alt.InlineData, series: _Series, at_peak: Sequence[int], unit: int) -> alt.Chart:
    """The areas: in the legend by size, but what is always there lies at the bottom, so that it is level."""
    keys = series.keys
    sized = zip(keys, series.names, at_peak, strict=True)
    labels = json.dumps({key: f"{name} {format_bytes(size)}" for key, name, size in sized})
    least = [min(column) for column in zip(*series.sizes, strict=True)]
    below = {key: sum(other > size for other in least) for key, size in zip(keys, least, strict=True)}
    if REST_COLOUR in series.colours:
        below[keys[-1]] = len(keys)
    legend = alt.Legend(title="At the peak", orient="bottom", symbolType="square", labelExpr=f"{labels}[datum.label]")
    scale = alt.Scale(domain=keys, range=list(series.colours))
    chart: alt.Chart = (
        alt.Chart(data)
        .transform_fold([*keys], as_=["key", "bytes"])
        .transform_calculate(order=f"{json.dumps(below)}[datum.key]", y=f"datum.bytes / {unit}")
        .mark_area(interpolate="step-after")
        .encode(color=alt.Color("key:N", scale=scale, legend=legend), order=alt.Order("order:Q"))
    )
    return chart


def _bytes_text(field: str) -> str:
    """A Vega expression: the bytes of a field as `format_bytes` writes them."""
    value = f"datum.{field}"
    text = f"{value} + ' B'"
    for unit, name in reversed(_UNITS):
        digits = f"{value} < {100 * unit} ? ',.2f' : ',.0f'"
        text = f"{value} >= {unit} ? format({value} / {unit}, {digits}) + ' {name}' : ({text})"
    return text


def _hover(data: alt.InlineData, series: _Series, name: str) -> alt.Chart:
    """A bar over each point that says all about it."""
    hovered = alt.selection_point(name=name, on="pointerover", clear="pointerout", empty=False)
    texts = {"all_text": _bytes_text("all")} | {f"{key}_text": _bytes_text(key) for key in series.keys}
    tooltip = [alt.Tooltip("phase:N"), alt.Tooltip("moment:N"), alt.Tooltip("all_text:N", title="in all")]
    named = zip(series.keys, series.names, strict=True)
    tooltip += [alt.Tooltip(f"{key}_text:N", title=name) for key, name in named]
    chart: alt.Chart = (
        alt.Chart(data)
        .transform_calculate(**texts)
        .mark_rect(color=_SHADE, aria=False)
        .encode(x="x:Q", x2="x2:Q", tooltip=tooltip, opacity=alt.condition(hovered, alt.value(0.5), alt.value(0.0)))
        .add_params(hovered)
    )
    return chart


def _bands(timeline: Timeline, position: Callable[[int], float]) -> alt.LayerChart:
    """Every other phase shaded, and each named above the plot."""
    begins = [position(phase.first_event) for phase in timeline.phases]
    shares = [end - begin for begin, end in zip(begins, [*begins[1:], 1.0], strict=True)]
    lines = [
        (phase.name.split() if share < _ONE_LINE_SHARE else [phase.name]) if share >= _LABEL_SHARE else [""]
        for phase, share in zip(timeline.phases, shares, strict=True)
    ]
    most = max(map(len, lines))
    rows = [
        {"x": begin, "x2": begin + share, "middle": begin + share / 2, "dark": number % 2}
        | {"name": "\n".join([" "] * (most - len(parts)) + parts)}
        for number, (begin, share, parts) in enumerate(zip(begins, shares, lines, strict=True))
    ]
    base = alt.Chart(alt.InlineData(values=rows))
    shade = alt.Opacity("dark:Q", scale=alt.Scale(domain=[0, 1], range=[0.0, 0.14]), legend=None)
    bands = base.mark_rect(color=_SHADE).encode(x="x:Q", x2="x2:Q", opacity=shade)
    names = base.mark_text(baseline="bottom", lineBreak="\n", lineHeight=_LINE_HEIGHT)
    # Vega lets further lines hang below the first one.
    above = alt.value(-6 - _LINE_HEIGHT * (most - 1))
    return alt.LayerChart(layer=[bands, names.encode(x="middle:Q", y=above, text="name:N")])


def _peak(timeline: Timeline, row: Mapping[str, Any], unit: int) -> alt.LayerChart:
    """The highest point with its size and moment."""
    x, size = (row["x"] + row["x2"]) / 2, timeline.peak_bytes
    label = {"x": x, "y": size / unit, "text": f"peak {format_bytes(size)}: {describe_point(timeline.peak)}"}
    base = alt.Chart(alt.InlineData(values=[label])).encode(x="x:Q", y="y:Q")
    point = base.mark_point(shape="triangle-down", filled=True, size=70, yOffset=-6, opacity=1)
    text = base.mark_text(align="right" if x > 0.5 else "left", dx=-8 if x > 0.5 else 8, dy=-10, fontWeight="bold")
    return alt.LayerChart(layer=[point, text.encode(text="text:N")])


def _capacity(size: int, unit: int) -> alt.LayerChart:
    row = {"y": size / unit, "text": f"capacity {format_bytes(size)}"}
    base = alt.Chart(alt.InlineData(values=[row])).encode(y="y:Q")
    text = base.mark_text(align="left", dx=4, dy=-8).encode(x=alt.value(0), text="text:N")
    return alt.LayerChart(layer=[base.mark_rule(strokeDash=[6, 4]), text])


def _draw(
    timeline: Timeline, series: _Series, title: alt.TitleParams, capacity: int | None, hover: str
) -> alt.LayerChart:
    position = _axis(timeline)
    seen = capacity if capacity is not None and capacity <= _SIGHT * timeline.peak_bytes else None
    top = max(timeline.peak_bytes, seen or 0)
    unit, unit_name = next((pair for pair in _UNITS if top >= pair[0]), (1, "B"))
    rows = _rows(timeline, series, position)
    data = alt.InlineData(values=rows)
    x_axis = alt.Axis(labels=False, ticks=False, grid=False)
    x = alt.X("x:Q", title=_axis_title(timeline), axis=x_axis, scale=alt.Scale(domain=[0, 1], nice=False))
    y_scale = alt.Scale(domain=[0, 1.12 * top / unit], nice=False)
    y = alt.Y("y:Q", title=f"live, {unit_name}", stack="zero", scale=y_scale)
    layers: list[alt.Chart | alt.LayerChart] = [
        *([_bands(timeline, position)] if timeline.phases else []),
        _areas(data, series, series.sizes[timeline.peak_point], unit).encode(x=x, y=y),
        _peak(timeline, rows[timeline.peak_point], unit),
        *([] if seen is None else [_capacity(seen, unit)]),
        _hover(data, series, hover),
    ]
    return alt.LayerChart(layer=layers, width=CHART_WIDTH, height=CHART_HEIGHT, title=title)


def draw_timelines(
    timelines: Mapping[str, Timeline], title: str, subtitle: str, capacities: Mapping[str, int]
) -> dict[str, alt.LayerChart]:
    """The picture of every tier on which anything lives.

    Args:
        timelines: by tier.
        title: of the pictures, such as the model and the cluster; the tier is added.
        subtitle: the plan in one line.
        capacities: bytes of the tiers whose size is known, drawn where within sight of the peak.
    """
    used = {tier: timeline for tier, timeline in timelines.items() if timeline.peak_bytes}
    colours = assign_colours(timeline.categories[: len(COLOURS)] for timeline in used.values())
    charts = {}
    for number, ((tier, timeline), mine) in enumerate(zip(used.items(), colours, strict=True)):
        heading = f"{title}: {tier} memory"
        above = alt.TitleParams(heading, subtitle=subtitle, offset=16)
        chart = _draw(timeline, _series(timeline, mine), above, capacities.get(tier), f"hover_{number}")
        charts[tier] = chart.properties(description=describe_timeline(timeline, heading))
    return charts


def combined_picture(charts: Mapping[str, alt.LayerChart]) -> dict[str, Any]:
    """The specification of all tiers' pictures, one below the other."""
    if len(charts) == 1:
        return dict(next(iter(charts.values())).to_dict())
    return dict(alt.vconcat(*charts.values()).resolve_scale(color="independent").to_dict())
