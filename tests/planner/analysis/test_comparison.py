"""Comparisons: rows computed by hand, written files, and memory that grows with the model."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest

from translution.cli.main import run
from translution.planner.analysis.comparison import (
    compared_models,
    comparison_rows,
    scale_points,
    scaled,
    smallest_cluster,
    thresholds,
)
from translution.planner.config.loading import preset
from translution.planner.config.training import TrainingSpec
from translution.planner.costs.parameters import count_parameters
from translution.planner.costs.workload import count_flops
from translution.planner.search.space import SearchConstraints

BF16 = TrainingSpec(precision="bf16", data="synthetic")


def test_every_operator_has_a_row() -> None:
    rows = list(comparison_rows(preset("vit-base/16"), "H100", BF16, (16,)))
    assert [(row.operator, row.alpha_rank) for row in rows] == [
        ("full Translution", None), ("α-Translution", 16), ("attention", None),
    ]  # fmt: skip
    full, low, attention = rows
    # 16 bytes per parameter x 15.6 G parameters = 233 GiB: four H100 of 80 GB hold them, two do not.
    assert full.parameters == 15_608_200_168
    assert full.states_bytes == 16 * full.parameters
    assert full.cluster == "1x4xH100"
    assert full.ranks == 4
    assert low.cluster == attention.cluster == "1x1xH100"
    assert full.training_flops > low.training_flops > attention.training_flops
    assert full.sample_s and low.sample_s and attention.sample_s
    for row, (_, _, spec) in zip(rows, compared_models(preset("vit-base/16"), (16,)), strict=True):
        assert row.parameters == count_parameters(spec).total
        assert row.training_flops == count_flops(spec).training_step


def test_offload_needs_no_more_gpus() -> None:
    for model in ("vit-base/16", "vit-large/32"):
        plain = smallest_cluster(preset(model), "A100-80", BF16, SearchConstraints(offload="none"))
        offloaded = smallest_cluster(preset(model), "A100-80", BF16, SearchConstraints())
        assert plain and offloaded
        assert offloaded.world_size <= plain.world_size


@pytest.mark.slow
def test_more_nodes_hold_larger_models() -> None:
    limits = list(thresholds(preset("vit-tiny/56"), "H100", BF16, ("width",)))
    own = [limit.largest for limit in limits]
    assert [limit.nodes for limit in limits] == [1, 2, 8]
    assert all(own)
    assert own == sorted(own, key=lambda value: value or 0)
    assert own[0] != own[2]


def test_memory_grows_along_every_axis() -> None:
    spec = preset("gpt-mini/256")
    points = list(scale_points(spec, BF16))
    for axis in ("width", "tokens", "depth"):
        for operator in ("full Translution", "α-Translution", "attention"):
            sizes = [point.states_bytes + point.saved_bytes for point in points
                     if (point.axis, point.operator) == (axis, operator)]  # fmt: skip
            assert len(sizes) >= 5
            assert sizes == sorted(sizes)
    assert scaled(spec, "width", 2)[0] == 128
    assert scaled(spec, "tokens", 3)[0] == 192
    assert scaled(preset("vit-base/16"), "tokens", 7)[0] == 50


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compare")
    arguments = ["compare", "vit-tiny/56", "--alpha-rank", "8", "--gpu", "A100-40"]
    for suffix in ("md", "csv", "json", "png", "svg"):
        arguments += ["--out", str(folder / f"table.{suffix}")]
    assert run(arguments) == 0
    return folder


@pytest.mark.slow
def test_files_hold_the_same_rows(written: Path) -> None:
    table = pd.read_csv(written / "table.csv")
    rows = json.loads((written / "table.json").read_text())
    assert list(table["parameters"]) == [row["parameters"] for row in rows]
    text = (written / "table.md").read_text()
    assert text.count("| vit-tiny/56 |") == len(rows) == 3
    assert "| full Translution up to |" in text
    assert "| 512 | 0.181 | 0.721 |" in text


@pytest.mark.slow
def test_charts_show_three_axes(written: Path) -> None:
    assert (written / "table.png").read_bytes().startswith(b"\x89PNG")
    text = (written / "table.svg").read_text()
    for label in (
        "model width",
        "tokens per sample",
        "layers",
        "full Translution",
        ">8<",
        "samples per GPU",
        "128 samples each",
    ):
        assert label in text


@pytest.mark.slow
def test_json_is_one_document(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["compare", "vit-tiny/56", "--alpha-rank", "4", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert {"rows", "thresholds", "traffic"} == set(document)
    assert {point["ranks"] for point in document["traffic"]} == {8}
