"""Monitors, the packages that a plan needs, and the settings that a resumed run may change."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers.runs import TINY, without_version_notes, write_plan

from translution.cli.main import run as run_cli
from translution.distributed.checkpoint.resume import check_same_training
from translution.distributed.runs.mode import RunMode
from translution.distributed.system.packages import check_training_packages
from translution.distributed.training.monitor import RunMonitor
from translution.planner.common.errors import InputError, MissingPackageError
from translution.planner.config.model import parse_model_spec
from translution.planner.config.training import TrainingSpec
from translution.planner.hardware.cluster import local_cpu_cluster
from translution.planner.plans.build import make_plan


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed's monitors write only on rank 0, so give them a rank."""
    import deepspeed.comm

    monkeypatch.setattr(deepspeed.comm, "get_rank", lambda: 0)


@pytest.mark.usefixtures("alone")
def test_a_resumed_run_appends_to_its_files(tmp_path: Path) -> None:
    for step in (1, 2):
        monitor = RunMonitor("csv", tmp_path)
        monitor.write("Train", step, {"loss": 0.5 * step, "grad_norm": None})
        monitor.write("Evaluation", step, {"accuracy": 0.25})
    folder = tmp_path / "monitor" / "csv"
    assert {path.name: path.read_text().split() for path in folder.iterdir()} == {
        "Train_loss.csv": ["step,loss", "1,0.5", "2,1.0"],
        "Evaluation_accuracy.csv": ["step,accuracy", "1,0.25", "2,0.25"],
    }


@pytest.mark.usefixtures("alone")
def test_a_resumed_run_keeps_its_wandb_run_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    fake = SimpleNamespace(
        init=lambda **options: calls.append(options), log=lambda data, step, commit: calls.append((data, step))
    )
    monkeypatch.setitem(sys.modules, "wandb", fake)
    numbers = []
    for step in (1, 2):
        for name in ("WANDB_DIR", "WANDB_RUN_ID", "WANDB_RESUME"):
            monkeypatch.setenv(name, "")
            monkeypatch.delenv(name)
        RunMonitor("wandb", tmp_path).write("Train", step, {"loss": 0.5})
        numbers.append(os.environ["WANDB_RUN_ID"])
        assert os.environ["WANDB_DIR"] == str(tmp_path / "monitor")
        assert os.environ["WANDB_RESUME"] == "allow"
    assert calls[0] == {"project": "translution", "group": None, "entity": None}
    assert [calls[1], calls[3]] == [({"Train/loss": 0.5}, 1), ({"Train/loss": 0.5}, 2)]
    assert numbers[0] == numbers[1] != ""


def test_no_monitor_makes_no_folder(tmp_path: Path) -> None:
    RunMonitor("none", tmp_path).write("Train", 1, {"loss": 0.5})
    assert not list(tmp_path.iterdir())


def without(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a package appear not to be installed."""
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == package else find(name, *more))


@pytest.mark.parametrize(
    ("values", "package", "install"),
    [
        ({"flip": 0.5}, "kornia", "translution-scale[train]"),
        ({"adam": "8bit"}, "bitsandbytes", "translution-scale[8bit]"),
        ({"monitor": "tensorboard"}, "tensorboard", "translution-scale[tensorboard]"),
        ({"monitor": "wandb"}, "wandb", "pip install wandb"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_missing_package_is_named_before_ranks_start(
    values: dict[str, Any],
    package: str,
    install: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = write_plan(tmp_path / "plan", 1, **values)
    without(package, monkeypatch)
    for command in ("launch", "preflight"):
        assert run_cli([command, str(folder)]) == 2
        error = without_version_notes(capsys.readouterr().err)
        assert error.count("\n") == 1
        assert f"{package} is missing:" in error
        assert install in error
    assert not (folder / "runs").exists()
    with pytest.raises(MissingPackageError):
        check_training_packages(TrainingSpec(**values))
    check_training_packages(TrainingSpec(monitor="csv", label_smoothing=0.1))


def test_a_plans_monitor_is_not_in_deepspeeds_configuration() -> None:
    """A monitor writes to the run folder, which is not known when a plan is made."""
    spec, cluster = parse_model_spec(TINY), local_cpu_cluster(1)
    plans = [make_plan(spec, cluster, TrainingSpec(monitor=name)) for name in ("none", "tensorboard")]
    assert plans[0].deepspeed_config() == plans[1].deepspeed_config()


def test_a_resumed_run_may_change_its_monitor_but_not_its_augmentation() -> None:
    spec, cluster = parse_model_spec(TINY), local_cpu_cluster(1)
    before = make_plan(spec, cluster, TrainingSpec())
    check_same_training(make_plan(spec, cluster, TrainingSpec(monitor="csv", evaluation_steps=5)), before)
    with pytest.raises(InputError, match=r"training.mixup: 0.5 is not allowed: must be 0.0, as in the run to resume"):
        check_same_training(make_plan(spec, cluster, TrainingSpec(mixup=0.5)), before)


def test_an_unknown_mode_is_refused() -> None:
    assert RunMode("resume") is RunMode.MEASURE_RESUME
    with pytest.raises(InputError, match=r"mode: 'later' is not allowed: must be one of train, continue, measure, "):
        RunMode("later")
