"""The defaults of dtype and data, which every entry point shares."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from translution import planner
from translution.cli.main import run
from translution.planner.config import default_data, default_precision
from translution.planner.hardware import named_cluster
from translution.reports.calculator.choice import Choice, search_input


@pytest.mark.parametrize(
    ("cluster", "precision"),
    [("8xH100", "bf16"), ("8xMI300X", "bf16"), ("8xV100-32", "fp16"), ("cpu:1", "fp32")],
)
def test_the_dtype_follows_the_device(cluster: str, precision: str) -> None:
    assert default_precision(named_cluster(cluster)) == precision


def test_a_gpu_of_unknown_rates_trains_in_bf16_and_measured_rates_count() -> None:
    unknown = planner.ClusterSpec(ranks_per_node=1, device_memory_bytes=2**34)
    assert default_precision(unknown) == "bf16"
    measured = {"matmul": [{"precision": "bf16", "rows": 8, "width": 8, "flops_per_s": 1.0}]}
    old = planner.load_cluster({"base": "1xV100-32", "measured": measured})
    assert default_precision(old) == "bf16"


@pytest.mark.parametrize(
    ("model", "data"),
    [("digits.yaml", "digits"), ("vit-base/16", "synthetic"), ("gpt-tiny/160", "synthetic")],
)
def test_only_the_model_of_digits_trains_on_digits(model: str, data: str, root: Path) -> None:
    source = str(root / "examples" / model) if model.endswith(".yaml") else model
    assert default_data(planner.load_model(source)) == data


def test_every_entry_point_has_the_same_defaults(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plan", "vit-tiny/56", "--cluster", "8xH100", "--out", str(tmp_path / "plan"), "--json"]) == 0
    printed = planner.load_plan(tmp_path / "plan").training
    called = planner.plan("vit-tiny/56", "8xH100").plan.training
    shown = search_input(Choice(model="vit-tiny/56")).training
    assert {(each.precision, each.data) for each in (printed, called, shown)} == {("bf16", "synthetic")}
    capsys.readouterr()
    assert run(["estimate", "vit-tiny/56", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["precision"] == "bf16"
    assert planner.estimate("vit-tiny/56").precision == "bf16"
    assert planner.estimate("vit-tiny/56", cluster="cpu:1").precision == "fp32"
    assert planner.compare(["vit-tiny/56"], alpha_ranks=[4]).precision == "bf16"


def test_a_recipe_keeps_the_dtype_that_was_published() -> None:
    settings = {"recipe": "translution-vit", "data": "synthetic", "stage": 0}
    assert planner.plan("vit-tiny/56", "1xH100", **settings).plan.training.precision == "fp32"
