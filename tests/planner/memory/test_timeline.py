"""Timelines: peaks of the summarized events, with their site and categories."""

from __future__ import annotations

import json
import time
from itertools import accumulate

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter

from translution.planner.common.errors import InputError
from translution.planner.common.schema import parse_json
from translution.planner.config.loading import preset
from translution.planner.memory.timeline import Timeline, make_timeline
from translution.planner.simulator.core import Event, MemoryTracker
from translution.planner.simulator.network.model import replay
from translution.planner.simulator.network.ops import DtypeSizes


def test_a_timeline_has_the_peak_with_its_site_and_categories() -> None:
    events = [
        ("forward", "embedding", "activations", 30),
        ("forward", "head", "temporaries", 50),
        ("forward", "head", "temporaries", -50),
        ("forward", "head", "activations", 10),
        ("backward", "head, backward", "gradients", 45),
        ("backward", "head, backward", "activations", -40),
        ("backward", "embedding, backward", "gradients", -45),
    ]
    timeline = make_timeline(events, {"parameters": 100, "unused": 0})
    assert timeline.categories == ("parameters", "gradients", "activations", "temporaries")
    assert timeline.peak_bytes == 185
    assert (timeline.peak.phase, timeline.peak.site) == ("backward", "head, backward")
    assert dict(zip(timeline.categories, timeline.peak.live_bytes, strict=True)) == {
        "parameters": 100, "gradients": 45, "activations": 40, "temporaries": 0,
    }  # fmt: skip
    assert [point.total_bytes for point in timeline.points] == [130, 180, 130, 140, 185, 145, 100]
    phases = [(phase.name, phase.first_event, phase.event_count, phase.peak_bytes) for phase in timeline.phases]
    assert phases == [("forward", 0, 4, 180), ("backward", 4, 3, 185)]


def test_a_point_has_the_highest_total_of_its_events() -> None:
    events = [("step", str(number), "x", size) for number, size in enumerate([1, 9, -8, 1, 1, -3, 2, -2])]
    timeline = make_timeline(events, points=3)
    assert [(point.first_event, point.site, point.live_bytes) for point in timeline.points] == [
        (0, "1", (10,)),
        (4, "4", (4,)),
    ]


def test_the_peak_may_be_before_the_first_event() -> None:
    timeline = make_timeline([("step", "end", "gradients", -7)], {"gradients": 7, "parameters": 5})
    assert timeline.peak_bytes == timeline.phases[0].peak_bytes == 12
    assert timeline.peak.live_bytes == (7, 5)


def test_a_phase_that_only_frees_has_its_peak_at_its_start() -> None:
    timeline = make_timeline([("forward", "", "x", 6), ("backward", "", "x", -2), ("backward", "", "x", 1)])
    assert [phase.peak_bytes for phase in timeline.phases] == [6, 6]


def test_a_step_without_events_has_one_point() -> None:
    timeline = make_timeline([], {"parameters": 5})
    assert (timeline.peak_bytes, timeline.event_count, timeline.phases, len(timeline.points)) == (5, 0, (), 1)


def test_freeing_more_than_is_live_is_an_error() -> None:
    with pytest.raises(ValueError, match="event 1: x: 2 bytes more are freed than are live"):
        make_timeline([("a", "", "x", 3), ("a", "", "x", -5)])


@st.composite
def steps(draw: st.DrawFn) -> tuple[dict[str, int], list[Event]]:
    """Draw events in a few phases that free no more bytes than are live."""
    live = draw(st.dictionaries(st.sampled_from("abcd"), st.integers(0, 50)))
    initial, events = dict(live), []
    for number in range(draw(st.integers(0, 60))):
        what = draw(st.sampled_from("abcde"))
        delta = draw(st.integers(-live.get(what, 0), 40))
        live[what] = live.get(what, 0) + delta
        events.append((f"phase {draw(st.integers(0, 2))}", f"site {number}", what, delta))
    return initial, events


@given(steps(), st.integers(1, 70))
def test_every_number_of_points_preserves_the_peaks(step: tuple[dict[str, int], list[Event]], points: int) -> None:
    initial, events = step
    timeline = make_timeline(events, initial, points=points)
    totals = list(accumulate((event[3] for event in events), initial=sum(initial.values())))
    assert timeline.peak_bytes == max(totals)
    assert 1 <= len(timeline.points) <= max(points, 2 * len(timeline.phases))
    begins = [point.first_event for point in timeline.points]
    assert begins == sorted(set(begins)) and begins[0] == 0
    for point, end in zip(timeline.points, [*begins[1:], len(events)], strict=True):
        own = totals[point.first_event + 1 : end + 1] if point.first_event else totals[: end + 1]
        assert point.total_bytes == max(own)
        if events:
            assert events[int(point.site.split()[1])][:2] == (point.phase, point.site)
            assert point.first_event <= int(point.site.split()[1]) < end
    for phase in timeline.phases:
        assert phase.peak_bytes == max(totals[phase.first_event : phase.first_event + phase.event_count + 1])
        assert {events[phase.first_event + number][0] for number in range(phase.event_count)} == {phase.name}
    assert {phase.first_event for phase in timeline.phases} <= {*begins}


def test_the_live_bytes_of_every_category_are_those_of_the_replay() -> None:
    memory = MemoryTracker(record=True)
    result = replay(preset("vit-tiny/56"), 2, DtypeSizes.of(2, "cuda"), 13, memory=memory)
    assert memory.events is not None
    timeline = make_timeline([("step", *event[1:]) for event in memory.events], points=50)
    peak = max(result.memory.peaks.values(), key=lambda peak: peak.total_bytes)
    assert timeline.peak_bytes == peak.total_bytes
    assert timeline.peak.site == peak.site
    shown = dict(zip(timeline.categories, timeline.peak.live_bytes, strict=True))
    assert {name: size for name, size in shown.items() if size} == {
        name: size for name, size in peak.live_bytes.items() if size
    }


def test_a_hundred_thousand_events_take_half_a_second() -> None:
    events = [
        ("forward" if number < 60_000 else "backward", "site", f"category {number % 12}", -7 if number % 3 else 15)
        for number in range(100_000)
    ]
    began = time.process_time()
    timeline = make_timeline(events, {f"category {number}": 10**6 for number in range(12)})
    assert time.process_time() - began < 0.5
    assert len(timeline.points) > 900
    assert len(timeline.model_dump_json()) < 250_000


def test_a_timeline_is_read_back_and_a_damaged_one_is_an_error() -> None:
    adapter = TypeAdapter(Timeline)
    timeline = make_timeline([("a", "b", "x", 3), ("a", "b", "y", 4)])
    assert parse_json(adapter, timeline.model_dump_json(), "timeline") == timeline
    data = timeline.model_dump(mode="json")
    with pytest.raises(InputError, match="peak_point: 9 is not allowed: must be below 2"):
        parse_json(adapter, json.dumps(data | {"peak_point": 9}), "timeline")
    with pytest.raises(InputError, match="live_bytes is not allowed: must hold 1 sizes"):
        parse_json(adapter, json.dumps(data | {"categories": ["x"]}), "timeline")
