"""Runs that start from a network file, of the authors' code or of another run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers.runs import TINY, write_plan
from safetensors.torch import load_file

from translution.cli.main import run as run_cli
from translution.planner.common.machine import usable_cores
from translution.planner.config.loading import load_model

needs_two_cores = pytest.mark.skipif(usable_cores() < 2, reason="needs two cores")
LAYOUTS: list[dict[str, Any]] = [
    {"stage": 3, "tile": 5},
    {"stage": 1, "tile": 18, "precision": "bf16"},
    {"stage": 0, "precision": "bf16"},
]


def imported(root: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    """A network file, made from a state dict of the authors' code by the command line."""
    weights = root / "tests" / "data" / "published" / "vit_full_hybrid_qkv.weights.safetensors"
    options = ["--revision", "13730aa", "--image", "8x12", "--patch", "4", "--name", "hybrid"]
    out = folder / "network.safetensors"
    assert run_cli(["import", str(weights), *options, "--out", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["parameters"] == 33_685
    assert run_cli(["import", str(weights), *options, "--out", str(out)]) == 2
    assert "exists already" in capsys.readouterr().err
    return out


@pytest.mark.slow
@needs_two_cores
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_run_starts_from_a_network_file(
    layout: dict[str, Any], root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], forked_launch: None
) -> None:
    network = imported(root, tmp_path, capsys)
    model = load_model(network)
    # Steps so small that the weights of the file can be read off the checkpoint.
    options = {"data": "synthetic", "steps": 2, "learning_rate": 1e-12}
    plan = write_plan(tmp_path / "plan", 2, model=model.model_dump(), **layout, **options)
    assert run_cli(["launch", str(plan), "--from", str(network)]) == 0
    exported = tmp_path / "exported.safetensors"
    assert run_cli(["export", str(plan / "runs" / "001"), "--out", str(exported)]) == 0
    before, after = load_file(network), load_file(exported)
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert (after[name] - value).abs().max() < 1e-9, name

    published = tmp_path / "published.pth"
    assert run_cli(["export", str(plan / "runs" / "001"), "--published", "--out", str(published)]) == 0
    assert not list(tmp_path.glob(".*"))
    assert run_cli(["launch", str(plan), "--from", str(network), "--resume"]) == 2
    assert "from: is not allowed with --resume" in capsys.readouterr().err


def test_a_network_file_of_another_model_is_refused(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    network, plan = imported(root, tmp_path, capsys), write_plan(tmp_path / "plan", 1, model=TINY)
    assert run_cli(["launch", str(plan), "--from", str(network)]) == 2
    assert "is not allowed: the plan's is" in capsys.readouterr().err
    assert run_cli(["launch", str(plan), "--from", str(tmp_path / "absent.safetensors")]) == 2
    assert "no such file" in capsys.readouterr().err
    assert not (plan / "runs").exists()
    assert run_cli(["export", str(network), "--published", "--out", str(network)]) == 2
    assert "exists already" in capsys.readouterr().err
    assert run_cli(["export", str(network), "--published", "--dtype", "bf16", "--out", "x.pth"]) == 2
    assert "dtype: 'bf16' is not allowed" in capsys.readouterr().err
