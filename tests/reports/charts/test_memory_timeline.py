"""The chart of a timeline: to scale, in distinguishable colours, as PNG and SVG."""

from __future__ import annotations

import itertools
import struct
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from numpy.typing import NDArray

from translution.planner.common.units import GIB
from translution.planner.memory.timeline import Timeline, make_timeline
from translution.planner.simulator.core import Event
from translution.reports.charts.memory_timeline import (
    assign_colours,
    combined_picture,
    describe_constant,
    describe_timeline,
    draw_measured,
    draw_timelines,
    is_constant,
    named_categories,
)
from translution.reports.render import vega
from translution.reports.render.vega import COLOURS, REST_COLOUR

EVENTS: list[Event] = [
    *(("forward", f"block {number}", "activations", GIB) for number in range(8)),
    ("backward", "block 7, backward", "gradients", 2 * GIB),
    *(("backward", f"block {number}, backward", "activations", -GIB) for number in range(8)),
    ("optimizer step", "begin", "gradients", -2 * GIB),
]


def timeline() -> Timeline:
    return make_timeline(EVENTS, {"parameters": 3 * GIB})


def spec(capacity: int | None = None, name: str = "a model") -> dict[str, Any]:
    charts = draw_timelines({"device": timeline()}, name, "ZeRO-3", {} if capacity is None else {"device": capacity})
    return dict(charts["device"].to_dict())


def data(document: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the data rows of the areas."""
    return next(rows for rows in document["datasets"].values() if "c0" in rows[0])


def texts(document: dict[str, Any]) -> list[str]:
    """Return all texts inside the plot."""
    return [
        row[key] for rows in document["datasets"].values() for row in rows for key in ("text", "name") if key in row
    ]


def test_every_event_is_drawn_with_the_live_bytes_after_it() -> None:
    rows = data(spec())
    assert [row["all"] for row in rows[:-1]] == [point.total_bytes for point in timeline().points]
    # Categories are sorted by size at the peak: 8 GiB activations, 3 GiB parameters, 2 GiB gradients.
    assert {key: rows[8][key] for key in ("c0", "c1", "c2")} == {"c0": 8 * GIB, "c1": 3 * GIB, "c2": 2 * GIB}
    assert (rows[8]["phase"], rows[8]["where"]) == ("backward", "block 7, backward")
    assert all(row["all"] == row["c0"] + row["c1"] + row["c2"] for row in rows)


def test_axis_has_no_gaps_and_short_phases_are_widened() -> None:
    rows = data(spec())
    assert rows[0]["x"] == 0.0 and rows[-1]["x"] == rows[-2]["x2"] == 1.0
    assert all(row["x"] < row["x2"] == after["x"] for row, after in itertools.pairwise(rows[:-1]))
    step = [row for row in rows[:-1] if row["phase"] == "optimizer step"]
    assert len(step) == 1 and step[0]["x2"] - step[0]["x"] >= 0.07


def test_peak_and_phases_are_labelled() -> None:
    written = texts(spec())
    assert "peak 13.00 GiB: block 7, backward" in written
    assert [text.split() for text in written if "peak" not in text] == [
        ["forward"],
        ["backward"],
        ["optimizer", "step"],
    ]


@pytest.mark.parametrize(
    ("capacity", "shown", "top"),
    [
        (20 * GIB, "capacity 20.00 GiB", 1.12 * 20),
        # The text at the top has room above the peak's label.
        (130 * GIB, "↑ capacity 130 GiB, 10 × the peak", 1.2 * 13),
        (10 * GIB, "capacity 10.00 GiB", 1.12 * 13),
        (None, None, 1.12 * 13),
    ],
)
def test_capacity_is_a_line_or_written_at_the_top(capacity: int | None, shown: str | None, top: float) -> None:
    document = spec(capacity)
    assert [text for text in texts(document) if "capacity" in text] == ([] if shown is None else [shown])
    (first,) = [param["value"] for param in document["params"] if param["name"] == "top_0"]
    assert first == pytest.approx(top)


def test_zoom_offers_every_phase_and_what_changes() -> None:
    zoom = spec(50 * GIB)["usermeta"]["zoom"]
    assert [part["name"] for part in zoom["parts"]] == ["forward", "backward", "optimizer step"]
    assert zoom["parts"][0]["from"] == 0 and zoom["parts"][-1]["to"] == 1
    assert all(one["to"] == other["from"] for one, other in itertools.pairwise(zoom["parts"]))
    ranges = {each["name"]: (each["from"], each["to"]) for each in zoom["ranges"]}
    assert list(ranges) == ["everything", "up to the peak", "what changes"]
    lowest, highest = ranges["what changes"]
    # 3 GiB of parameters are live throughout, and the first point has 1 GiB of activations or less.
    assert 3 <= lowest <= 4 and 13 < highest < 17


def test_categories_beyond_the_colours_are_summed() -> None:
    sizes = {f"category {number:02}": 100 - number for number in range(12)}
    events: list[Event] = [("step", "", "category 00", size) for size in (-1, -1, 2)]
    document = draw_timelines({"host": make_timeline(events, sizes)}, "m", "p", {})["host"].to_dict()
    rows = data(document)
    assert rows[-1]["all"] == sum(rows[-1][f"c{number}"] for number in range(10)) == sum(sizes.values())
    assert rows[-1]["c9"] == 91 + 90 + 89
    assert "3 others" in str(document["layer"])


def test_activations_are_never_among_the_others() -> None:
    events: list[Event] = [
        ("forward", "", "activations", 3),
        *(("forward", "", f"buffer {number:02}", 1000 - number) for number in range(12)),
        ("backward", "", "activations", -3),
    ]
    found = make_timeline(events)
    assert found.categories[-1] == "activations"
    assert named_categories(found)[-1] == "activations"
    assert "activations 3 B" in str(draw_timelines({"device": found}, "m", "p", {})["device"].to_dict()["layer"])


def test_categories_that_change_are_named_before_larger_constant_ones() -> None:
    constant = {f"constant {number}": 100 - number for number in range(9)}
    events: list[Event] = [("forward", "", "gathered", 50), ("backward", "", "gathered", -50)]
    named = named_categories(make_timeline(events, constant))
    assert "gathered" in named and "constant 8" not in named


def test_constant_tier_is_a_sentence_and_no_picture() -> None:
    constant = make_timeline([], {"states": GIB})
    charts = draw_timelines({"device": timeline(), "nvme": constant, "host": make_timeline([])}, "m", "p", {})
    assert list(charts) == ["device"]
    assert is_constant(constant) and not is_constant(timeline())
    assert describe_constant(constant, "NVMe") == "NVMe memory holds 1.00 GiB throughout: states 1.00 GiB."


def test_prediction_is_drawn_over_what_was_measured() -> None:
    document = draw_measured(timeline(), [(0.0, 3 * GIB), (0.5, 40 * GIB), (1.0, GIB)], "m", "p", 80 * GIB)
    (line,) = [rows for rows in document["datasets"].values() if [row.get("y") for row in rows] == [3, 40, 1]]
    assert [row["x"] for row in line] == [0.0, 0.5, 1.0]
    assert "with a peak of 40.00 GiB" in document["description"]
    (top,) = [param["value"] for param in document["params"] if param["name"].startswith("top_")]
    # The line is higher than the areas, and 80 GiB are too far above the measured peak of 13 GiB to be drawn.
    assert top == pytest.approx(1.2 * 40)


def test_colours_are_unique_in_a_chart_and_shared_between_charts() -> None:
    first, second, third = assign_colours([["a", "b"], ["c", "b"], ["c", "a", "b"]])
    assert first["b"] == second["b"] == third["b"]
    assert first["a"] == second["c"] == third["c"] != third["a"]
    full = assign_colours([[str(number) for number in range(len(COLOURS))]])[0]
    assert sorted(full.values()) == sorted(COLOURS)


MACHADO = {
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}
"""Linear RGB as seen without one type of cone. Source: Machado, Oliveira and Fernandes, 2009, severity 1."""


def linear(colour: str) -> NDArray[np.float64]:
    value = np.array([int(colour[start : start + 2], 16) for start in (1, 3, 5)]) / 255
    return np.asarray(np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4))


def lab(rgb: NDArray[np.float64]) -> NDArray[np.float64]:
    matrix = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    xyz = matrix @ rgb.clip(0, 1) / [0.9505, 1, 1.089]
    x, y, z = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("vision", ["all cones", *MACHADO])
def test_colours_are_distinguishable_with_any_colour_vision(vision: str) -> None:
    seen = np.array(MACHADO.get(vision, np.eye(3)))
    for one, other in itertools.combinations([*COLOURS, REST_COLOUR], 2):
        # 2.3 is the just noticeable difference of adjacent colours.
        assert np.linalg.norm(lab(seen @ linear(one)) - lab(seen @ linear(other))) > 20, (one, other)


@pytest.mark.parametrize("page", ["#ffffff", "#0d1117"])
def test_colours_contrast_with_the_page(page: str) -> None:
    behind = linear(page) @ [0.2126, 0.7152, 0.0722]
    for colour in (*COLOURS, REST_COLOUR):
        light, dark = sorted((linear(colour) @ [0.2126, 0.7152, 0.0722], behind), reverse=True)
        assert (light + 0.05) / (dark + 0.05) > 1.7, colour


def test_alternative_text_describes_peak_and_phases() -> None:
    assert describe_timeline(timeline(), "A model") == (
        "A model. Stacked areas: live bytes over 18 allocations and releases. Peak 13.00 GiB at block 7, backward: "
        "activations 8.00 GiB, parameters 3.00 GiB, gradients 2.00 GiB. Peak of each phase: forward 11.00 GiB, "
        "backward 13.00 GiB, optimizer step 5.00 GiB."
    )


def test_specification_renders_as_png_and_svg() -> None:
    document = spec(20 * GIB, name="<b>&")
    picture = vega.png(document, scale=2.0)
    width, height = struct.unpack(">II", picture[16:24])
    assert picture[:8] == b"\x89PNG\r\n\x1a\n"
    assert width > 2 * 860 and height > 2 * 340
    root = ElementTree.fromstring(vega.svg(document))
    fills = {element.get("fill", "").lower() for element in root.iter()}
    assert set(COLOURS[:3]) <= fills
    assert COLOURS[3] not in fills
    written = {"".join(element.itertext()) for element in root.iter() if element.tag.endswith("text")}
    assert {"<b>&: device memory", "capacity 20.00 GiB", "activations 8.00 GiB", "optimizerstep"} <= written


def test_tiers_are_combined_in_one_picture() -> None:
    charts = draw_timelines({"device": timeline(), "host": make_timeline(EVENTS)}, "m", "p", {})
    written = vega.svg(combined_picture(charts))
    assert "m: device memory" in written and "m: host memory" in written
