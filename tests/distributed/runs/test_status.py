"""What a stopped run prints: a command that can be pasted into a shell."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from translution.cli.main import run
from translution.distributed.runs.folder import make_run_folders
from translution.distributed.runs.status import RankStatus, read_run_status, resume_hint, write_status
from translution.planner import load_model, make_plan
from translution.planner.config.training import TrainingSpec
from translution.planner.hardware.cluster import load_cluster


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    training = TrainingSpec(data="synthetic", precision="bf16", micro_batch=1)
    folder = tmp_path / "my plans"
    make_plan(load_model("vit-tiny/56"), load_cluster("1xH100"), training).write(folder)
    return folder


@pytest.mark.parametrize("inside", [True, False])
def test_the_hint_to_resume_is_a_command_of_this_plan(plan: Path, tmp_path: Path, *, inside: bool) -> None:
    folder = plan / "runs" / "001" if inside else tmp_path / "my run"
    make_run_folders(folder, plan)
    write_status(folder, RankStatus(rank=0, state="stopped", step=3))
    hint = resume_hint(folder)
    assert hint.startswith("saved at step 3: resume it with translution launch ")
    words = shlex.split(hint.partition(" with ")[2])
    assert words[2:] == [str(plan if inside else folder), "--resume", "--run", str(folder)]


def test_a_plan_folder_stands_for_its_newest_run(plan: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = plan / "runs" / "001"
    make_run_folders(folder, plan)
    write_status(folder, RankStatus(rank=0, state="finished", step=3))
    assert read_run_status(plan) == read_run_status(folder)
    assert run(["status", str(plan)]) == 0
    for words in (["verify-checkpoint", str(plan)], ["export", str(plan), "--out", str(plan / "x.safetensors")]):
        assert run(words) == 2
        assert f"{folder / 'checkpoint'}: holds no complete checkpoint" in capsys.readouterr().err


def test_calibration_counts_the_gpus_before_it_compiles(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["calibrate", "--cluster", "8xH100", "--out", str(tmp_path / "mine.yaml")]) == 2
    assert "cluster: 8 GPUs are not allowed: this machine has" in capsys.readouterr().err
