"""The picture of an experiment: common axes, and where a model that knows nothing is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.report_folders import experiment_folder

from translution.reports.sections.experiment import chance_value, experiment_picture, experiment_section


@pytest.mark.parametrize(("name", "chance"), [("shift", 0.1), ("language", 8.0)])
def test_facets_have_one_axis_and_a_chance_line(name: str, chance: float, tmp_path: Path) -> None:
    result = experiment_folder(tmp_path / name, name)
    spec = experiment_picture(result)
    assert chance_value(result) == pytest.approx(chance)
    inner = spec.get("spec", spec)
    ends = {json.dumps(layer["encoding"]["x"]["scale"]["domain"]) for layer in inner["layer"][:2]}
    assert len(ends) == 1
    low, high = json.loads(ends.pop())
    assert low == 0 and high >= chance and (high == 1 or name == "language")
    assert [layer["encoding"]["x"] for layer in inner["layer"][2:]] == [{"datum": pytest.approx(chance)}] * 2
    # Facets share their scales unless a chart says otherwise, and layers of a facet have no data of their own.
    assert "resolve" not in spec and not any("data" in layer for layer in inner["layer"])
    (rows,) = spec["datasets"].values()
    tests = {row["test"] for row in rows}
    assert len(tests) == sum(row["first"] for row in rows) == (4 if name == "shift" else 1)
    assert ("facet" in spec) == (len(tests) > 1)
    assert f"Dashed: chance, {chance:.0%} for" in str(experiment_section(result)) or name == "language"
