"""Predicted step times against the public record: the figures that the planner must reach."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="module")
def script() -> Iterator[Any]:
    import importlib

    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "benchmarks"))
        yield importlib.import_module("public_runs")


@pytest.fixture(scope="module")
def runs(script: Any) -> Any:
    return script.predict_runs()


def test_published_runs_of_mpt_are_predicted(script: Any, runs: Any) -> None:
    for group in ([run for run in runs if run.gpu == gpu] for gpu in ("H100", "A100-80", "A100-40")):
        assert len(group) >= 30
        found = script.summarize(group)
        assert 0.95 <= found["median"] <= 1.08
        assert found["within_20_percent"] >= 0.8
        assert found["inside_the_interval"] >= 0.85
    every = script.summarize(runs)
    assert every["runs"] == 104
    # A wide interval would hold anything.
    assert max(every["widest_above"], every["widest_below"]) <= 0.35


def test_runs_that_fitted_their_gpus_fit_without_headroom(script: Any, runs: Any) -> None:
    assert all(run.utilization <= 1 for run in runs)
    # A bound that is always low would hold as well.
    assert max(run.utilization for run in runs) > 0.9
    fits = script.predict_fits()
    assert len(fits) == 3
    for fit in fits:
        assert (fit.utilization <= 1) is fit.fitted, fit


def test_published_figures_of_single_runs_are_predicted(script: Any) -> None:
    figures = script.predict_figures()
    assert len(figures) == 5
    for figure in figures:
        assert abs(figure.ratio - 1) <= figure.allowed, figure


def test_the_committed_report_has_the_predictions_of_this_planner(script: Any, runs: Any, root: Path) -> None:
    committed = json.loads((root / "reports" / "public.json").read_text())
    fresh = script.make_document(runs)
    assert [row["run"] for row in committed["rows"]] == [row["run"] for row in fresh["rows"]]
    for row, expected in zip(committed["rows"], fresh["rows"], strict=True):
        assert row["predicted_s"] == pytest.approx(expected["predicted_s"])
    assert (root / "reports" / "public.md").read_text() == script.render(committed)
