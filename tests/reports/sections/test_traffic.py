"""The section on traffic: its curves, the marks where they cross, and the table under them."""

from __future__ import annotations

from typing import Any

import pytest

from translution.planner.analysis.traffic import crossing_samples
from translution.planner.common.provenance import make_provenance
from translution.planner.config.loading import preset
from translution.planner.config.model import override
from translution.reports.render.document import Picture, Table
from translution.reports.render.vega import svg
from translution.reports.sections.traffic import add_traffic, traffic_section

MADE = make_provenance("translution compare vit-base/16", ())
BASE = preset("vit-base/16")


def rows_of(spec: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the data of all layers of a chart."""
    return [row for rows in spec["datasets"].values() for row in rows]


def test_curves_and_table_have_the_same_figures_and_the_crossing_is_marked() -> None:
    section = traffic_section(BASE, MADE)
    assert section is not None
    batch, ranks, table = section.parts
    assert isinstance(batch, Picture) and isinstance(ranks, Picture) and isinstance(table, Table)
    rows = rows_of(batch.spec)
    for samples, *sizes in table.rows:
        own = [row for row in rows if row["x"] == samples and "way" in row]
        assert [row["GB"] for row in own] == pytest.approx([sizes[0], sizes[1], sizes[2], sizes[3]])
    marks = [row for row in rows if "way" not in row]
    assert [round(row["x"], 6) for row in marks] == [round(crossing_samples(BASE, n) / n, 6) for n in (8, 64)]
    assert [row["text"] for row in marks] == ["491", "77"]
    assert table.foot[0][2::2] == ("491 samples per GPU", "77 samples per GPU")
    assert "as much at 77 samples per GPU with 64 GPUs" in batch.description
    # Against ranks both curves meet where the product of ranks and samples is the same.
    meets = {row["curve"]: row["x"] for row in rows_of(ranks.spec) if "way" not in row}
    assert set(meets) == {"32 samples each", "128 samples each"}
    assert meets["32 samples each"] == pytest.approx(4 * meets["128 samples each"], rel=0.1)
    assert "5,137 samples of a group" in section.text[0]


def test_a_picture_of_a_comparison_has_the_charts_below() -> None:
    above = {"$schema": "x", "mark": "bar", "data": {"name": "a"}, "datasets": {"a": [{"x": 1}]}, "description": "Top."}
    both = add_traffic(above, BASE)
    assert set(both["datasets"]) > {"a"}
    assert both["vconcat"][0]["mark"] == "bar"
    assert both["description"].startswith("Top. Bytes sent against samples per GPU")
    drawn = svg(both | {"$schema": "https://vega.github.io/schema/vega-lite/v6.json"})
    for text in ("samples per GPU", "relation parallelism", ">491<", ">77<"):
        assert text in drawn


def test_a_model_with_few_relations_has_no_such_section() -> None:
    # A grid of 1 x 1 with a class token has one offset and three relations with the token.
    small = override(preset("vit-tiny/56"), image=56)
    assert small.geometry.relations == 4
    assert traffic_section(small, MADE) is None
    assert "vconcat" in add_traffic({"mark": "bar"}, small)
