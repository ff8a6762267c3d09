"""The benchmark of relation parallelism compares two trainings that agree, and shows nothing if they do not."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
from helpers.runs import run_ranks_of


@pytest.fixture
def script(root: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(root / "benchmarks")
    return importlib.import_module("relation_parallel")


@pytest.mark.slow
def test_a_small_network_trains_alike_under_both(tmp_path: Path, script: Any) -> None:
    out = tmp_path / "ranks.json"
    run_ranks_of([script.__file__, "--small", "--repeats", "1", "--rank-out", out], 2, tmp_path / "log")
    document = script.make_document(True, json.loads(out.read_text()))
    assert document["loss_difference"] <= 1e-6
    assert document["times_faster"] > 0
    # Under ZeRO-3 every table travels three times; other parameters as well.
    assert document["zero3"]["bytes"] > document["predicted_bytes"]["zero3"]
    assert document["relation"]["bytes"] > document["predicted_bytes"]["relation"]
    table = script.render(document)
    assert f"| {document['times_faster']:.2f}× faster | {document['times_fewer_bytes']:.1f}× fewer |" in table


def test_the_kept_record_has_tables_of_more_than_100_million_parameters(root: Path, script: Any) -> None:
    folder = root / "benchmarks" / "results"
    document = json.loads((folder / "relation_parallel.json").read_text())
    assert document["parameters"]["components"]["relation tables"] >= 100e6
    assert document["loss_difference"] <= script.TOLERANCE
    assert (folder / "relation_parallel.md").read_text() == script.render(document)
    found = {"relation": [1.0, 0.9], "zero3": [1.0, 0.8]}
    with pytest.raises(SystemExit, match=r"losses differ by 1.2e-01, more than 1e-04: no figures are shown"):
        script.make_document(False, {"losses": found})
