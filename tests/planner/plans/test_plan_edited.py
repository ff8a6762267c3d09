"""A plan file that was edited after planning: predicted anew, with a note, or refused."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from translution.cli.main import run
from translution.planner.common.errors import DoesNotFitError, InputError
from translution.planner.config.loading import preset
from translution.planner.config.training import TrainingSpec
from translution.planner.hardware.cluster import load_cluster
from translution.planner.plans.build import make_plan, predict_checked
from translution.planner.plans.plan import EditedPlanWarning, load_plan

Edit = Callable[[dict[str, Any]], object]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    training = TrainingSpec(data="synthetic", precision="bf16", micro_batch=1)
    make_plan(preset("vit-tiny/56"), load_cluster("8xH100"), training).write(tmp_path / "plan")
    return tmp_path / "plan"


def edit(folder: Path, change: Edit) -> None:
    document = json.loads((folder / "plan.json").read_text())
    change(document)
    (folder / "plan.json").write_text(json.dumps(document))


def test_an_untouched_plan_loads_without_a_warning(folder: Path) -> None:
    before = load_plan(folder)
    edit(folder, lambda document: None)  # Only the white space differs.
    assert load_plan(folder) == before


def test_an_edited_plan_is_predicted_anew(folder: Path) -> None:
    before = load_plan(folder)
    edit(folder, lambda document: document["model"].update(depth=12))
    with pytest.warns(EditedPlanWarning, match=r"plan.json was edited after it was planned; .* GiB a rank, .* before"):
        plan = load_plan(folder)
    assert plan.model.depth == 12
    assert plan.prediction.peak_bytes > before.prediction.peak_bytes
    assert plan == predict_checked(plan.run_config)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda plan: plan.update(tile_relations=10**9), InputError, "tile_relations: 1000000000 is not allowed"),
        (lambda plan: plan["training"].update(data="tokens", data_path="/x"), InputError, "data: 'tokens'"),
        (lambda plan: plan["training"].update(micro_batch=10**6), DoesNotFitError, "does not fit"),
        (lambda plan: plan["cluster"].update(device_memory_bytes=2**20), DoesNotFitError, "does not fit"),
        (lambda plan: plan["training"].update(optimizer="sgd", adam="torch"), InputError, "adam: 'torch'"),
    ],
)
def test_an_edited_plan_that_cannot_run_is_refused(
    folder: Path, change: Edit, error: type[Exception], message: str
) -> None:
    edit(folder, change)
    with pytest.raises(error, match=rf"plan\.json: .*{message}"):
        load_plan(folder)


def test_a_plan_without_a_digest_loads_as_it_is(folder: Path) -> None:
    before = load_plan(folder)
    edit(folder, lambda document: document.pop("digest"))
    assert load_plan(folder) == before


def test_the_command_line_says_it_in_one_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit(folder, lambda document: document["training"].update(steps=7))
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        assert run(["launch", str(folder), "--dry-run"]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith(f"note: {folder / 'plan.json'} was edited after it was planned")
    edit(folder, lambda document: document.update(tile_relations=10**9))
    assert run(["launch", str(folder), "--dry-run"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
