"""The chart of a memory timeline: stacked live bytes by category over the events of a step.

As in memory viewers, the axis counts allocations and releases, not seconds; phases with few events are widened to stay
visible. The page zooms by setting the parameters of `Zoom`; a static image shows their first values.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import altair as alt

from translution.planner.common import GIB, KIB, MIB, TIB, format_bytes
from translution.planner.memory import Timeline, TimelinePoint
from translution.planner.simulator.network import ACTIVATIONS

from ..render.vega import COLOURS, REST_COLOUR, ChartRows
from .timeline_zoom import ROOM, Zoom, zoom_choices

CHART_WIDTH, CHART_HEIGHT = 860, 340
_UNITS = ((TIB, "TiB"), (GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB"))
_MIN_SHARE = 0.08
"""Minimum fraction of the axis for a phase."""
_LABEL_SHARE = 0.05
"""Fraction of the axis below which a phase has no label; the tooltip names it."""
_ONE_LINE_SHARE = 0.2
"""Fraction of the axis below which each word of a phase's name has its own line."""
_LINE_HEIGHT = 14
_TEXT_ROOM = 0.08
"""Further height of a plot with a text at its top, over that of its content."""
_LETTER_WIDTH = 6.6
"""Mean width of a bold letter, pixels."""
_MAX_CAPACITY_RATIO = 5.0
"""A tier's capacity is drawn to scale if it is at most this multiple of the peak, else it is written at the top."""
_SHADE = "#808080"
_LINE_COLOUR = "#e5484d"
_MEASURED_NUMBER = 99


@dataclass(frozen=True, slots=True)
class _Series:
    """The areas of a chart: the largest categories, and the sum of the others."""

    names: tuple[str, ...]
    sizes: tuple[tuple[int, ...], ...]
    """Bytes at every point, in the order of the names."""
    colours: tuple[str, ...]

    @property
    def keys(self) -> list[str]:
        """Column names of the data; category names may contain any character."""
        return [f"c{number}" for number in range(len(self.names))]


def describe_point(point: TimelinePoint) -> str:
    """Return where in the step a point is, in words."""
    if not point.site or point.phase in point.site:
        return point.site or point.phase or "throughout"
    return f"{point.site}, {point.phase}"


def describe_timeline(timeline: Timeline, title: str) -> str:
    """Return the alternative text of the chart."""
    sizes = zip(timeline.categories, timeline.peak.live_bytes, strict=True)
    parts = ", ".join(f"{name} {format_bytes(size)}" for name, size in sizes if size)
    phases = ", ".join(f"{phase.name} {format_bytes(phase.peak_bytes)}" for phase in timeline.phases)
    return (
        f"{title}. Stacked areas: live bytes over {timeline.event_count:,} allocations and releases. Peak "
        f"{format_bytes(timeline.peak_bytes)} at {describe_point(timeline.peak)}: {parts}. Peak of each phase: "
        f"{phases}."
    )


def assign_colours(charts: Iterable[Sequence[str]]) -> list[dict[str, str]]:
    """Assign a colour to each name of each chart: unique within a chart and, if possible, the same in all charts.

    Args:
        charts: names in each chart, at most one per colour.
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


def _named(timeline: Timeline) -> list[int]:
    """Return the categories that have a colour of their own, in their order: the others are summed.

    Activations always have one. Of the rest, those have one that are large or change much over the step: changes are
    what the chart shows, and so they count twice.
    """
    columns = list(zip(*(point.live_bytes for point in timeline.points), strict=True))

    def weight(number: int) -> tuple[bool, int]:
        highest, lowest = max(columns[number]), min(columns[number])
        return timeline.categories[number] == ACTIVATIONS, highest + 2 * (highest - lowest)

    ranked = sorted(range(len(columns)), key=weight, reverse=True)
    return sorted(ranked[: len(COLOURS)])


def named_categories(timeline: Timeline) -> list[str]:
    """Return the names of the categories that have a colour of their own."""
    return [timeline.categories[number] for number in _named(timeline)]


def _series(timeline: Timeline, colours: Mapping[str, str]) -> _Series:
    own = _named(timeline)
    names = tuple(timeline.categories[number] for number in own)
    sizes = [tuple(point.live_bytes[number] for number in own) for point in timeline.points]
    shades = tuple(colours[name] for name in names)
    count = len(timeline.categories) - len(own)
    if count:
        names, shades = (*names, f"{count} others"), (*shades, REST_COLOUR)
        rest = [point.total_bytes - sum(row) for point, row in zip(timeline.points, sizes, strict=True)]
        sizes = [(*row, size) for row, size in zip(sizes, rest, strict=True)]
    return _Series(names, tuple(sizes), shades)


def _axis(timeline: Timeline) -> Callable[[int], float]:
    """Return the function from event numbers to positions between 0 and 1."""
    if not timeline.phases:
        return float
    minimum = min(_MIN_SHARE, 0.5 / len(timeline.phases))
    shares = [max(phase.event_count / timeline.event_count, minimum) for phase in timeline.phases]
    ends = [end / sum(shares) for end in accumulate(shares)]
    starts = [phase.first_event for phase in timeline.phases]

    def position(event: int) -> float:
        number = bisect_right(starts, event) - 1
        begin = ends[number - 1] if number else 0.0
        part = (event - starts[number]) / timeline.phases[number].event_count
        return round(begin + part * (ends[number] - begin), 5)

    return position


def _axis_title(timeline: Timeline) -> str:
    widened = any(phase.event_count < _MIN_SHARE * timeline.event_count for phase in timeline.phases)
    text = f"{timeline.event_count:,} allocations and releases, in order"
    return f"{text}; short phases are widened" if widened else text


def _rows(timeline: Timeline, series: _Series, position: Callable[[int], float]) -> list[dict[str, Any]]:
    begins = [position(point.first_event) for point in timeline.points]
    rows: list[dict[str, Any]] = [
        {"x": begin, "x2": end, "phase": point.phase, "where": point.site, "all": point.total_bytes}
        | dict(zip(series.keys, sizes, strict=True))
        for begin, end, point, sizes in zip(begins, [*begins[1:], 1.0], timeline.points, series.sizes, strict=True)
    ]
    # The last step of the areas ends at the last point.
    return [*rows, rows[-1] | {"x": 1.0}]


def _areas(data: ChartRows, series: _Series, at_peak: Sequence[int], unit: int) -> alt.Chart:
    """Return the areas: by size in the legend, but constant categories at the bottom, so that their edges are level."""
    keys = series.keys
    sized = zip(keys, series.names, at_peak, strict=True)
    labels = json.dumps({key: f"{name} {format_bytes(size)}" for key, name, size in sized})
    minima = [min(column) for column in zip(*series.sizes, strict=True)]
    below = {key: sum(other > size for other in minima) for key, size in zip(keys, minima, strict=True)}
    legend = alt.Legend(title="At the peak", orient="bottom", symbolType="square", labelExpr=f"{labels}[datum.label]")
    scale = alt.Scale(domain=keys, range=list(series.colours))
    chart: alt.Chart = (
        alt.Chart(data)
        .transform_fold([*keys], as_=["key", "bytes"])
        .transform_calculate(order=f"{json.dumps(below)}[datum.key]", y=f"datum.bytes / {unit}")
        .mark_area(interpolate="step-after", clip=True)
        .encode(color=alt.Color("key:N", scale=scale, legend=legend), order=alt.Order("order:Q"))
    )
    return chart


def _bytes_text(field: str) -> str:
    """Return a Vega expression that formats the bytes of a field as `format_bytes` does."""
    value = f"datum.{field}"
    text = f"{value} + ' B'"
    for unit, name in reversed(_UNITS):
        digits = f"{value} < {100 * unit} ? ',.2f' : ',.0f'"
        text = f"{value} >= {unit} ? format({value} / {unit}, {digits}) + ' {name}' : ({text})"
    return text


def _hover(data: ChartRows, series: _Series, name: str) -> alt.Chart:
    """Return a bar over each point whose tooltip shows all sizes at that point."""
    hovered = alt.selection_point(name=name, on="pointerover", clear="pointerout", empty=False)
    texts = {"all_text": _bytes_text("all")} | {f"{key}_text": _bytes_text(key) for key in series.keys}
    tooltip = [alt.Tooltip("phase:N"), alt.Tooltip("where:N"), alt.Tooltip("all_text:N", title="total")]
    named = zip(series.keys, series.names, strict=True)
    tooltip += [alt.Tooltip(f"{key}_text:N", title=name) for key, name in named]
    chart: alt.Chart = (
        alt.Chart(data)
        .transform_calculate(**texts)
        .mark_rect(color=_SHADE, aria=False, clip=True)
        .encode(x="x:Q", x2="x2:Q", tooltip=tooltip, opacity=alt.condition(hovered, alt.value(0.5), alt.value(0.0)))
        .add_params(hovered)
    )
    return chart


def _bands(timeline: Timeline, position: Callable[[int], float], zoom: Zoom) -> alt.LayerChart:
    """Return the phases: every other one shaded, each named above the middle of what is visible of it."""
    begins = [position(phase.first_event) for phase in timeline.phases]
    shares = [end - begin for begin, end in zip(begins, [*begins[1:], 1.0], strict=True)]
    lines = [
        phase.name.split() if share < _ONE_LINE_SHARE else [phase.name]
        for phase, share in zip(timeline.phases, shares, strict=True)
    ]
    most = max(map(len, lines))
    rows = [
        {"x": begin, "x2": begin + share, "dark": number % 2, "name": "\n".join([" "] * (most - len(parts)) + parts)}
        for number, (begin, share, parts) in enumerate(zip(begins, shares, lines, strict=True))
    ]
    base = alt.Chart(ChartRows(values=rows))
    shade = alt.Opacity("dark:Q", scale=alt.Scale(domain=[0, 1], range=[0.0, 0.14]), legend=None)
    bands = base.mark_rect(color=_SHADE, clip=True).encode(x="x:Q", x2="x2:Q", opacity=shade)
    left, right = f"max(datum.x, {zoom.start})", f"min(datum.x2, {zoom.end})"
    named = base.transform_filter(f"{right} - {left} >= {_LABEL_SHARE} * ({zoom.end} - {zoom.start})")
    named = named.transform_calculate(middle=f"({left} + {right}) / 2")
    names = named.mark_text(baseline="bottom", lineBreak="\n", lineHeight=_LINE_HEIGHT)
    # Vega places further lines below the first one.
    above = alt.value(-6 - _LINE_HEIGHT * (most - 1))
    return alt.LayerChart(layer=[bands, names.encode(x="middle:Q", y=above, text="name:N")])


def _peak(timeline: Timeline, row: Mapping[str, Any], unit: int, zoom: Zoom) -> alt.LayerChart:
    """Return the mark of the highest point, with its size and where it is: above it, within the plot's sides."""
    x, size = (row["x"] + row["x2"]) / 2, timeline.peak_bytes
    label = {"x": x, "y": size / unit, "text": f"peak {format_bytes(size)}: {describe_point(timeline.peak)}"}
    base = alt.Chart(ChartRows(values=[label])).encode(x="x:Q", y="y:Q")
    base = base.transform_filter(f"datum.x >= {zoom.start} && datum.x <= {zoom.end}")
    point = base.mark_point(shape="triangle-down", filled=True, size=70, yOffset=-6, opacity=1, clip=True)
    half = f"min({_LETTER_WIDTH / 2 * len(label['text'])}, width / 2)"
    place = f"width * ({x} - {zoom.start}) / ({zoom.end} - {zoom.start})"
    shift = alt.ExprRef(f"clamp({place}, {half}, width - {half}) - {place}")
    text = base.mark_text(align="center", dx=shift, dy=-18, fontWeight="bold", clip=True)
    return alt.LayerChart(layer=[point, text.encode(text="text:N")])


def _capacity(size: int, unit: int) -> alt.LayerChart:
    row = {"y": size / unit, "text": f"capacity {format_bytes(size)}"}
    base = alt.Chart(ChartRows(values=[row])).encode(y="y:Q")
    text = base.mark_text(align="left", dx=4, dy=-8, clip=True).encode(x=alt.value(0), text="text:N")
    return alt.LayerChart(layer=[base.mark_rule(strokeDash=[6, 4], clip=True), text])


def _capacity_above(size: int, peak_bytes: int) -> alt.Chart:
    """Return the capacity as a text at the top of the plot, for a tier that is far from full."""
    row = {"text": f"\u2191 capacity {format_bytes(size)}, {size / peak_bytes:,.0f} \u00d7 the peak"}
    chart: alt.Chart = (
        alt.Chart(ChartRows(values=[row]))
        .mark_text(align="left", baseline="top", dx=4, dy=4)
        .encode(x=alt.value(0), y=alt.value(0), text="text:N")
    )
    return chart


def _predicted(line: Sequence[tuple[float, int]], unit: int) -> alt.Chart:
    """Return a line of live bytes over the areas, from pairs of a position and bytes."""
    rows = [{"x": x, "y": size / unit} for x, size in line]
    base = alt.Chart(ChartRows(values=rows))
    chart: alt.Chart = base.mark_line(
        interpolate="step-after", color=_LINE_COLOUR, strokeWidth=1.5, clip=True, aria=False
    ).encode(x="x:Q", y="y:Q")
    return chart


def _draw(
    timeline: Timeline,
    series: _Series,
    title: alt.TitleParams,
    capacity: int | None,
    number: int,
    predicted: Sequence[tuple[float, int]] = (),
) -> alt.LayerChart:
    position, zoom = _axis(timeline), Zoom(number)
    to_scale = capacity is not None and capacity <= _MAX_CAPACITY_RATIO * timeline.peak_bytes
    highest = max(timeline.peak_bytes, *(size for _, size in predicted), capacity or 0 if to_scale else 0)
    unit, unit_name = next((pair for pair in _UNITS if timeline.peak_bytes >= pair[0]), (1, "B"))
    rows = _rows(timeline, series, position)
    data = ChartRows(values=rows)
    x_axis = alt.Axis(labels=False, ticks=False, grid=False)
    x = alt.X("x:Q", title=_axis_title(timeline), axis=x_axis, scale=zoom.scale_x())
    y = alt.Y("y:Q", title=f"live, {unit_name}", stack="zero", scale=zoom.scale_y())
    written = capacity is not None and not to_scale
    top = (ROOM + _TEXT_ROOM * written) * highest / unit
    layers: list[alt.Chart | alt.LayerChart] = [
        *([_bands(timeline, position, zoom)] if timeline.phases else []),
        _areas(data, series, series.sizes[timeline.peak_point], unit).encode(x=x, y=y),
        *([_predicted(predicted, unit)] if predicted else []),
        _peak(timeline, rows[timeline.peak_point], unit, zoom),
        _hover(data, series, f"hover_{number}"),
    ]
    if capacity is not None:
        layers.insert(-1, _capacity(capacity, unit) if to_scale else _capacity_above(capacity, timeline.peak_bytes))
    return alt.LayerChart(
        layer=layers,
        width=CHART_WIDTH,
        height=CHART_HEIGHT,
        title=title,
        usermeta={"zoom": {"number": number} | zoom_choices(timeline, position, top, unit)},
    ).add_params(*zoom.params(top))


def is_constant(timeline: Timeline) -> bool:
    """Return True if the same bytes are live throughout, which takes a sentence and no picture."""
    return len({point.live_bytes for point in timeline.points}) == 1


def describe_constant(timeline: Timeline, tier: str) -> str:
    """Return the sentence on a tier whose live bytes do not change."""
    sizes = zip(timeline.categories, timeline.peak.live_bytes, strict=True)
    parts = ", ".join(f"{name} {format_bytes(size)}" for name, size in sizes if size)
    return f"{tier[0].upper()}{tier[1:]} memory holds {format_bytes(timeline.peak_bytes)} throughout: {parts}."


def draw_timelines(
    timelines: Mapping[str, Timeline], title: str, subtitle: str, capacities: Mapping[str, int]
) -> dict[str, alt.LayerChart]:
    """Draw the chart of every tier whose live bytes change.

    Args:
        timelines: timelines by tier.
        title: title of the charts, such as the model and the cluster; the tier is appended.
        subtitle: the plan in one line.
        capacities: bytes of the tiers whose size is known; drawn as a line, or written if far above the peak.

    Returns:
        Charts by tier.
    """
    used = {tier: timeline for tier, timeline in timelines.items() if not is_constant(timeline)}
    colours = assign_colours(map(named_categories, used.values()))
    charts = {}
    for number, ((tier, timeline), mine) in enumerate(zip(used.items(), colours, strict=True)):
        heading = f"{title}: {tier} memory"
        above = alt.TitleParams(heading, subtitle=subtitle, offset=16)
        chart = _draw(timeline, _series(timeline, mine), above, capacities.get(tier), number)
        charts[tier] = chart.properties(description=describe_timeline(timeline, heading))
    return charts


def draw_measured(
    timeline: Timeline, predicted: Sequence[tuple[float, int]], title: str, subtitle: str, capacity: int
) -> dict[str, Any]:
    """Draw a measured timeline with the predicted live bytes as a line over it.

    Args:
        timeline: what was measured.
        predicted: pairs of a position, 0 to 1, and the bytes from there on.
        title: title of the chart.
        subtitle: what was measured, in one line.
        capacity: bytes of the memory.

    Returns:
        Vega-Lite specification.
    """
    (colours,) = assign_colours([named_categories(timeline)])
    above = alt.TitleParams(title, subtitle=subtitle, offset=16)
    # No other chart of a page has this number.
    chart = _draw(timeline, _series(timeline, colours), above, capacity, _MEASURED_NUMBER, predicted)
    peak = max(size for _, size in predicted)
    text = f"{describe_timeline(timeline, title)} Line: predicted, with a peak of {format_bytes(peak)}."
    return dict(chart.properties(description=text).to_dict())


def combined_picture(charts: Mapping[str, alt.LayerChart]) -> dict[str, Any]:
    """Return one Vega-Lite specification with the charts of all tiers below each other."""
    if len(charts) == 1:
        return dict(next(iter(charts.values())).to_dict())
    # Only a chart of its own can have data for the page.
    parts = [chart.copy(deep=False) for chart in charts.values()]
    for part in parts:
        part.usermeta = alt.Undefined
    return dict(alt.vconcat(*parts).resolve_scale(color="independent").to_dict())
