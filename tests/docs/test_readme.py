"""The figures in the README are those that its commands print; test_pages.py runs the commands."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from translution.cli.main import run


@pytest.fixture
def readme(root: Path) -> str:
    return (root / "README.md").read_text(encoding="utf-8")


def test_the_costs_shown_are_the_planners(readme: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["estimate", "vit-base/16", "--precision", "fp32"]) == 0
    printed = capsys.readouterr().out
    rows = [line for line in readme.splitlines() if re.match(r"(full Translution|α-Translution|attention) ", line)]
    assert len(rows) == 3
    for row in rows:
        for cell in re.split(r" {2,}", row):
            assert cell in printed


def test_the_benchmark_shown_is_the_committed_one(readme: str, root: Path) -> None:
    results = root / "benchmarks" / "results"
    document = json.loads((results / "operator.json").read_text())
    row = next(row for row in document["results"] if row["case"] == "ViT-A/56")
    shown = next(line for line in readme.splitlines() if line.startswith("| ViT-A/56"))
    assert f"{row['grouped_seconds']:.3f} s" in shown
    assert f"{row['times_faster']:.0f}×" in shown
    assert f"{row['times_smaller']:.0f}×" in shown
    assert shown in (results / "operator.md").read_text()
    shares = [round(other["matmul_rate_share"] * 100) for other in document["results"] if other is not row]
    assert f"at {min(shares)} to {max(shares)}% of the rate" in readme
    assert f"takes {document['alpha']['time_ratio']:.0f} times as long as attention" in readme
    assert f"tables alone make it {document['alpha']['operations_ratio']:.0f} times the operations" in readme
    assert row["times_faster"] >= 20
    assert row["times_smaller"] >= 20
    assert document["parity"] <= 1e-10
