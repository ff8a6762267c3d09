"""Geometry of the page's charts: shares of memory, the course of a step, the trade-off, and operators on a log scale.

Positions and widths are in percent of a chart, so that the template draws charts of any width with text of one size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from translution.planner.common import GIB, Tier, format_bytes, format_count, format_flops
from translution.planner.search import ParetoPoint
from translution.planner.timing import StepTime

from .result import Costs, OperatorCost, PlanView, TierUse

SERIES = 8
"""Colours of a chart; what is smaller is one grey remainder."""
REST = "others"
SHOWN_OPERATORS = ("translution", "alpha", "attention")
"""Operators that are always in the chart, besides the chosen one."""
_ITEM_WORDS = {
    "nccl": "NCCL",
    "nccl host": "NCCL",
    "context": "GPU context",
    "blas workspace": "BLAS workspace",
    "other streams": "in use by other streams",
    "micro-batches": "input",
}


@dataclass(frozen=True, slots=True)
class Segment:
    """A rectangle of a chart."""

    name: str
    text: str
    """Its size in words."""
    start: float
    width: float
    series: int
    """Number of its colour; `SERIES` is the grey of the remainder, -1 is idle time."""


@dataclass(frozen=True, slots=True)
class Lane:
    """Segments in one row."""

    name: str
    segments: tuple[Segment, ...]


@dataclass(frozen=True, slots=True)
class Tick:
    """A labelled position of an axis."""

    position: float
    text: str


@dataclass(frozen=True, slots=True)
class MemoryBar:
    """The stacked bar of one tier."""

    tier: TierUse
    lane: Lane
    limit: float | None
    """Position of the capacity without headroom; None if the capacity is unknown."""
    share: float | None
    """Peak as a fraction of the capacity."""


@dataclass(frozen=True, slots=True)
class MemoryChart:
    """Memory by category, one bar for each tier."""

    bars: tuple[MemoryBar, ...]
    legend: tuple[Segment, ...]
    """Every category once, with its size in the first tier that holds it."""


def item_words(name: str) -> str:
    """Return an item of a memory breakdown in words."""
    return _ITEM_WORDS.get(name, name)


def memory_chart(plan: PlanView, headroom: float) -> MemoryChart:
    """Return the bars of memory by category against capacity; a category has one colour in all bars.

    Args:
        plan: the plan.
        headroom: fraction of every memory that stays free.
    """
    sizes: dict[str, int] = {}
    first: dict[str, int] = {}
    """The first tier that holds a category."""
    for number, tier in enumerate(plan.tiers):
        for item in tier.breakdown:
            name = item_words(item.name)
            sizes[name] = sizes.get(name, 0) + item.bytes
            first.setdefault(name, number)
    largest = sorted(sizes, key=lambda name: -sizes[name])[:SERIES]
    colours = {name: number for number, name in enumerate(sorted(largest, key=lambda name: first[name]))}
    bars = tuple(_memory_bar(tier, colours, headroom) for tier in plan.tiers)
    parts = [segment for bar in bars for segment in bar.lane.segments]
    legend = {segment.name: segment for segment in reversed(parts)}
    return MemoryChart(bars, tuple(sorted(legend.values(), key=lambda segment: segment.series)))


def _memory_bar(tier: TierUse, colours: dict[str, int], headroom: float) -> MemoryBar:
    scale = max(tier.peak_bytes, tier.capacity_bytes or 0, 1)
    parts: dict[tuple[int, str], int] = {}
    for item in tier.breakdown:
        name = item_words(item.name)
        key = (colours[name], name) if name in colours else (SERIES, REST)
        parts[key] = parts.get(key, 0) + item.bytes
    segments, start = [], 0.0
    for (series, name), size in sorted(parts.items()):
        width = 100 * size / scale
        segments.append(Segment(name, format_bytes(size), start, width, series))
        start += width
    capacity = tier.capacity_bytes
    limit = None if capacity is None else 100 * capacity * (1 - headroom) / scale
    return MemoryBar(tier, Lane(tier.name, tuple(segments)), limit, tier.peak_bytes / capacity if capacity else None)


@dataclass(frozen=True, slots=True)
class StepChart:
    """The course of one optimizer step."""

    lanes: tuple[Lane, ...]
    ticks: tuple[Tick, ...]


def seconds_text(value: float) -> str:
    """Return a time for people: from milliseconds to days."""
    if value < 1:
        return f"{1000 * value:.3g} ms"
    if value < 600:
        return f"{value:.3g} s"
    if value < 3600:
        return f"{value / 60:.3g} min"
    hours = value / 3600
    return f"{hours:.3g} h" if hours < 100 else f"{hours / 24:,.0f} days"


def step_chart(time: StepTime) -> StepChart:
    """Return the parts of a step over time, those that overlap with the computation in lanes of their own.

    `StepTime` is what `estimate_step_time` predicts: overlapping parts add the time by which they exceed computation,
    which the first lane shows as waiting.
    """
    total = time.likely_s
    longest = sorted(time.breakdown, key=lambda part: -part.likely_s)[:SERIES]
    coloured = [part.name for part in time.breakdown if part in longest]
    numbers = {p.name: coloured.index(p.name) if p.name in coloured else SERIES for p in time.breakdown}
    parts = [(part.name, part.likely_s, numbers[part.name]) for part in time.breakdown if not part.overlaps]
    waiting = total - sum(seconds for _, seconds, _ in parts)
    if waiting > 1e-6 * total:
        first = next((number for number, part in enumerate(time.breakdown) if part.overlaps), len(parts))
        parts.insert(first, ("waiting for what runs at the same time", waiting, -1))
    aside = [(p.name, p.likely_s, numbers[p.name]) for p in time.breakdown if p.overlaps and p.bound != "engine"]
    engine = [(p.name, p.likely_s, numbers[p.name]) for p in time.breakdown if p.overlaps and p.bound == "engine"]
    named = (("computation", parts), ("at the same time", aside), ("DeepSpeed's Python code", engine))
    lanes = tuple(Lane(name, _in_a_row(row, total)) for name, row in named if row)
    ticks = tuple(Tick(100 * at / total, seconds_text(at) if at else "0") for at in _linear_ticks(total, 5))
    return StepChart(lanes, ticks)


def _in_a_row(parts: Sequence[tuple[str, float, int]], total: float) -> tuple[Segment, ...]:
    segments, start = [], 0.0
    for name, seconds, series in parts:
        width = 100 * seconds / total
        segments.append(Segment(name, seconds_text(seconds), start, width, series))
        start += width
    return tuple(segments)


def _linear_ticks(most: float, count: int) -> list[float]:
    """Return at most about `count` round numbers from 0 to `most`."""
    raw = most / count
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= raw)
    return [step * number for number in range(int(most / step * 1.000001) + 1)]


def _log_ticks(least: float, most: float) -> list[float]:
    """Return powers of ten, or for a small range also twice and five times these, from `least` to `most`."""
    exponents = range(math.floor(math.log10(least)), math.ceil(math.log10(most)) + 1)
    factors = (1, 2, 5) if most / least < 100 else (1,)
    ticks = [factor * 10.0**exponent for exponent in exponents for factor in factors]
    return [tick for tick in ticks if least <= tick <= most]


@dataclass(frozen=True, slots=True)
class TradePoint:
    """A Pareto-optimal plan in the chart."""

    x: float
    y: float
    point: ParetoPoint
    text: str
    chosen: bool


@dataclass(frozen=True, slots=True)
class TradeChart:
    """Time against memory."""

    points: tuple[TradePoint, ...]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    capacity: float | None
    """Position of the device's usable memory, if it is within the chart."""
    several: bool
    """Whether the plans differ in the number of nodes."""


def trade_chart(front: Sequence[ParetoPoint], plan: PlanView, headroom: float) -> TradeChart | None:
    """Return the Pareto-optimal plans by device memory (linear) and step time (logarithmic); None of fewer than two.

    Args:
        front: plans to draw.
        plan: the plan that is shown, which is marked if it is one of them.
        headroom: fraction of every memory that stays free.
    """
    if len(front) < 2:
        return None
    capacity = next((tier.capacity_bytes for tier in plan.tiers if tier.tier == Tier.DEVICE), None)
    usable = None if capacity is None else capacity * (1 - headroom)
    right = 1.12 * max(point.device_bytes for point in front)
    right = max(right, 1.04 * usable) if usable and usable < 2 * right else right
    low, high = (choose(point.step_s for point in front) for choose in (min, max))
    low, high = low / 1.25, high * 1.25

    def x(size: float) -> float:
        return 100 * size / right

    def y(seconds: float) -> float:
        return 100 * (1 - math.log(seconds / low) / math.log(high / low))

    points = tuple(
        TradePoint(x(point.device_bytes), y(point.step_s), point, _point_text(point), _is_shown(point, plan))
        for point in front
    )
    x_ticks = tuple(Tick(x(at * GIB), f"{at:g}") for at in _linear_ticks(right / GIB, 5))
    y_ticks = tuple(Tick(y(at), seconds_text(at)) for at in _log_ticks(low, high))
    within = usable is not None and usable <= right
    several = len({point.nodes for point in front}) > 1
    return TradeChart(points, x_ticks, y_ticks, x(usable) if within and usable else None, several)


def _point_text(point: ParetoPoint) -> str:
    nodes = f"{point.nodes} node{'s' if point.nodes != 1 else ''}"
    return (
        f"{seconds_text(point.step_s)} a step, at most {format_bytes(point.device_bytes)} of tensors on {nodes}: "
        f"{point.strategy}, micro-batch {point.micro_batch}, checkpointing {point.checkpointing}"
    )


def _is_shown(point: ParetoPoint, plan: PlanView) -> bool:
    same = (point.nodes, point.micro_batch, point.checkpointing, point.tile_relations)
    if same != (plan.nodes, plan.micro_batch, plan.checkpointing, plan.tile_relations) or plan.time is None:
        return False
    return math.isclose(point.step_s, plan.time.likely_s, rel_tol=1e-6)


@dataclass(frozen=True, slots=True)
class OperatorBar:
    """One operator's bar of one measure."""

    label: str
    text: str
    width: float
    times: float
    """Multiple of the smallest bar."""
    own: bool


@dataclass(frozen=True, slots=True)
class Measure:
    """A measure of all operators on a logarithmic scale."""

    title: str
    bars: tuple[OperatorBar, ...]
    ticks: tuple[Tick, ...]
    """The powers of ten."""


_MEASURES: tuple[tuple[str, Callable[[OperatorCost], int], Callable[[int], str]], ...] = (
    ("Parameters", lambda cost: cost.parameters, format_count),
    ("Model states with AdamW, all GPUs", lambda cost: cost.state_bytes, format_bytes),
    ("Saved for backward, one sample", lambda cost: cost.saved_bytes, format_bytes),
    ("Saved by the published code, one sample", lambda cost: cost.published_saved_bytes, format_bytes),
    ("Operations of training, one sample", lambda cost: cost.training_flops, format_flops),
)


def operator_chart(costs: Costs) -> tuple[Measure, ...]:
    """Return every measure of the chosen operator and of `SHOWN_OPERATORS`."""
    own = costs.operators[0]
    by_name = {cost.operator: cost for cost in costs.operators}
    shown = [by_name[name] for name in SHOWN_OPERATORS if name in by_name]
    rows = shown if own in shown else [own, *shown]
    return tuple(_measure(title, rows, own, value, form) for title, value, form in _MEASURES)


def _measure(
    title: str,
    rows: Sequence[OperatorCost],
    own: OperatorCost,
    value: Callable[[OperatorCost], int],
    form: Callable[[int], str],
) -> Measure:
    values = [max(1, value(row)) for row in rows]
    # The smallest bar keeps a tenth of the width or more.
    low, high = math.log10(min(values)) - 0.3, math.log10(max(values))
    span = max(high - low, 1.0)
    bars = tuple(
        OperatorBar(row.label, form(value(row)), 100 * (math.log10(n) - low) / span, n / min(values), row is own)
        for row, n in zip(rows, values, strict=True)
    )
    decades = range(math.ceil(low), math.floor(low + span) + 1)
    ticks = tuple(Tick(100 * (decade - low) / span, "") for decade in decades)
    return Measure(title, bars, ticks)
