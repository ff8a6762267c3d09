"""The charts show the plan's figures: shares add up, overlaps lie where they occur, scales are right."""

from __future__ import annotations

import re

import pytest

from translution.planner.common import GIB
from translution.reports.calculator.charts import (
    REST,
    SERIES,
    Lane,
    memory_chart,
    operator_chart,
    seconds_text,
    step_chart,
    trade_chart,
)
from translution.reports.calculator.choice import Choice
from translution.reports.calculator.pages import asset
from translution.reports.calculator.result import Outcome, PlanView, costs_of, search_choice
from translution.reports.render.vega import COLOURS, REST_COLOUR


def plan_of(**fields: object) -> PlanView:
    found = Outcome.model_validate_json(search_choice(Choice().replacing(**fields)).outcome).plan
    assert found is not None
    return found


@pytest.fixture(scope="module")
def offloaded() -> PlanView:
    """A plan with three tiers and much that overlaps."""
    return plan_of(model="vit-base/32", minimize="memory")


def end(lane: Lane) -> float:
    return sum(segment.width for segment in lane.segments)


def test_memory_bars_add_up_to_the_peak_and_end_at_the_capacity(offloaded: PlanView) -> None:
    chart = memory_chart(offloaded, 0.1)
    assert [bar.tier.tier for bar in chart.bars] == ["device", "host", "pinned"]
    for bar in chart.bars:
        assert bar.tier.capacity_bytes is not None and bar.share is not None
        assert end(bar.lane) == pytest.approx(100 * bar.share)
        assert bar.share == bar.tier.peak_bytes / bar.tier.capacity_bytes
        assert bar.limit == pytest.approx(90)
        starts = [segment.start for segment in bar.lane.segments]
        assert starts == sorted(starts) and starts[0] == 0
    colours: dict[str, int] = {}
    for segment in (*chart.legend, *(one for bar in chart.bars for one in bar.lane.segments)):
        assert colours.setdefault(segment.name, segment.series) == segment.series
    assert len(set(colours.values())) == len(colours) == SERIES + 1
    assert colours[REST] == SERIES
    assert {segment.name for segment in chart.legend} == set(colours)


def test_memory_without_a_known_capacity_has_no_limit(offloaded: PlanView) -> None:
    tiers = tuple(tier.model_copy(update={"capacity_bytes": None}) for tier in offloaded.tiers)
    for bar in memory_chart(offloaded.model_copy(update={"tiers": tiers}), 0.1).bars:
        assert (bar.limit, bar.share) == (None, None)
        assert end(bar.lane) == pytest.approx(100)


def test_a_step_is_as_long_as_what_follows_each_other(offloaded: PlanView) -> None:
    time = offloaded.time
    assert time is not None
    chart = step_chart(time)
    assert end(chart.lanes[0]) == pytest.approx(100)
    for lane in chart.lanes[1:]:
        assert end(lane) <= 100.001
    shown = {segment.name: segment for lane in chart.lanes for segment in lane.segments}
    for part in time.breakdown:
        assert shown[part.name].width == pytest.approx(100 * part.likely_s / time.likely_s)
        assert (shown[part.name] in chart.lanes[0].segments) is not part.overlaps
    assert chart.ticks[0].text == "0" and chart.ticks[-1].position <= 100


def test_what_exceeds_the_computation_is_waiting() -> None:
    time = plan_of(stage=3).time
    assert time is not None
    slow = tuple(
        part.model_copy(update={"likely_s": part.likely_s + (1.0 if part.name == "parameter gathers" else 0)})
        for part in time.breakdown
    )
    chart = step_chart(time.model_copy(update={"breakdown": slow, "likely_s": time.likely_s + 0.9}))
    (idle,) = [segment for segment in chart.lanes[0].segments if segment.series == -1]
    before = time.likely_s - sum(part.likely_s for part in time.breakdown if not part.overlaps)
    assert idle.width == pytest.approx(100 * (before + 0.9) / (time.likely_s + 0.9))
    names = [segment.name for segment in chart.lanes[0].segments]
    assert names[:2] == ["forward", "backward"] and names[2] == idle.name


def test_the_trade_off_has_time_on_a_log_scale_and_marks_the_plan() -> None:
    plan = plan_of(nodes=2, model="vit-small/32", minimize="nodes")
    chart = trade_chart(plan.pareto, plan, 0.08)
    assert chart is not None and chart.several
    assert [point.point for point in chart.points] == list(plan.pareto)
    for one in chart.points:
        assert 0 < one.x < 100 and 0 < one.y < 100
    fastest = min(chart.points, key=lambda one: one.point.step_s)
    slowest = max(chart.points, key=lambda one: one.point.step_s)
    assert fastest.y > slowest.y
    # A linear axis of memory: x is proportional to bytes.
    assert fastest.x / slowest.x == pytest.approx(fastest.point.device_bytes / slowest.point.device_bytes)
    for tick in chart.x_ticks[1:]:
        scale = fastest.point.device_bytes / GIB / fastest.x
        assert tick.position * scale == pytest.approx(float(tick.text))
    assert sum(one.chosen for one in chart.points) <= 1
    # One plan is no trade-off, and its picture would be an empty rectangle.
    assert trade_chart((), plan, 0.08) is None and trade_chart(plan.pareto[:1], plan, 0.08) is None
    single = plan_of(model="vit-small/32")
    own = trade_chart(single.pareto, single, 0.08)
    assert own is not None
    assert [one.chosen for one in own.points].index(True) == 0


def test_bars_of_operators_are_logarithmic() -> None:
    measures = operator_chart(costs_of(Choice(operator="shaw")))
    assert [bar.label for bar in measures[0].bars][1:] == ["full Translution", "α-Translution", "attention"]
    assert [bar.own for bar in measures[0].bars] == [True, False, False, False]
    bars = {bar.label: bar for bar in measures[0].bars}
    full, alpha, plain = (bars[name] for name in ("full Translution", "α-Translution", "attention"))
    decade = measures[0].ticks[1].position - measures[0].ticks[0].position
    assert 10 ** ((full.width - plain.width) / decade) == pytest.approx(full.times / plain.times)
    assert 10 ** ((alpha.width - plain.width) / decade) == pytest.approx(alpha.times / plain.times)
    assert full.width == pytest.approx(100)
    for measure in measures:
        assert min(bar.times for bar in measure.bars) == 1
        assert all(0 < bar.width <= 100.001 for bar in measure.bars)


def test_times_are_in_the_unit_that_people_use() -> None:
    texts = [seconds_text(value) for value in (0.0123, 1.5, 599.0, 1800.0, 7200.0, 10.0**6)]
    assert texts == ["12.3 ms", "1.5 s", "599 s", "30 min", "2 h", "12 days"]


def test_colours_are_those_of_the_reports() -> None:
    colours = dict(re.findall(r"--s(\d): (#\w{6})", asset("calculator.css")))
    assert [colours[str(number)] for number in range(SERIES)] == list(COLOURS[:SERIES])
    assert colours[str(SERIES)] == REST_COLOUR
