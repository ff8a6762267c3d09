"""Checks before a launch: each problem is one line that names the fix."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
from helpers.runs import TINY, without_version_notes, write_plan

from translution.cli.main import run
from translution.distributed.preflight import checks
from translution.distributed.runs.folder import new_run_folder
from translution.distributed.system import filesystem
from translution.distributed.system.nvme_swap import PREFIX
from translution.planner.common.errors import InputError
from translution.planner.common.machine import usable_cores
from translution.planner.common.phases import Tier
from translution.planner.config.model import parse_model_spec
from translution.planner.costs.parameters import count_parameters
from translution.planner.plans.folder import write_plan_folder
from translution.planner.plans.plan import load_plan

pytestmark = pytest.mark.skipif(usable_cores() < 2, reason="needs two cores")

SWAPPED = TINY | {"dim": 256, "heads": 4}


def launch_error(folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """Return the one line of launch's error; no run folder is created."""
    assert run(["launch", str(folder)]) == 2
    text = without_version_notes(capsys.readouterr().err)
    assert text.count("\n") == 1
    assert not (folder / "runs").exists()
    assert run(["preflight", str(folder)]) == 1
    assert "FAILED" in capsys.readouterr().out
    return text


def test_a_plan_that_can_run_here_passes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_plan(tmp_path / "plan", 2)
    assert run(["preflight", str(folder), "--json"]) == 0
    checks = json.loads(capsys.readouterr().out)["checks"]
    names = {"shared memory", "host memory", "/dev/shm", "disk for 1 checkpoint", "locks of compiled ops", "ops"}
    assert names == {check["name"] for check in checks}
    assert all(check["passed"] for check in checks)


def test_too_little_memory_and_disk_space_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_plan(tmp_path / "plan", 2)
    plan = load_plan(folder)
    # A plan for a machine with more memory and disk space.
    own = [
        peak.model_copy(update={"bytes": peak.bytes + 2**45}) if peak.tier == "host" else peak
        for peak in plan.prediction.peaks
    ]
    prediction = plan.prediction.model_copy(update={"peaks": tuple(own)})
    large = parse_model_spec(TINY | {"dim": 4096, "depth": 64, "image": 128})
    plan = plan.model_copy(update={"prediction": prediction, "model": large})
    write_plan_folder(plan, folder, force=True)
    error = launch_error(folder, capsys)
    assert "host memory: 64.00 TiB needed" in error or "host memory: 64 TiB needed" in error
    assert "end other programs" in error
    assert "(and 1 more: translution preflight" in error


@pytest.mark.parametrize("fault", ["absent", "a file", "in memory"])
def test_an_unusable_nvme_folder_is_named(fault: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as memory:
        path = {"absent": tmp_path / "absent", "a file": tmp_path / "file", "in memory": Path(memory)}[fault]
        if fault == "a file":
            path.touch()
        folder = write_plan(tmp_path / "plan", 2, model=SWAPPED, tile=16, offload="nvme-optimizer", nvme_path=path)
        error = launch_error(folder, capsys)
    message = "is in memory (tmpfs)" if fault == "in memory" else "is not a folder: create it (mkdir -p"
    assert f"NVMe folder {path}: {message}" in error


def test_a_usable_nvme_folder_passes_with_its_speed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_plan(tmp_path / "plan", 2, model=SWAPPED, tile=16, offload="nvme-optimizer", nvme_path=tmp_path)
    plan = load_plan(folder)
    cluster = plan.cluster.model_copy(update={"nvme_write_bytes_per_s": 2.0**30})
    write_plan_folder(plan.model_copy(update={"cluster": cluster}), folder, force=True)
    assert run(["preflight", str(folder)]) == 0
    printed = capsys.readouterr().out
    assert f"ok      NVMe speed of {tmp_path}: " in printed
    assert "written per second (planned with 1.00 GiB), " in printed
    assert "read per second\n" in printed
    assert list(tmp_path.iterdir()) == [folder]


@pytest.mark.parametrize(
    ("training", "count"),
    [
        ({}, 1),
        ({"checkpoint_steps": 2}, 2),
        ({"checkpoint_steps": 1}, 3),
        ({"checkpoint_steps": 1, "keep_checkpoints": 1}, 2),
        ({"checkpoint_steps": 2, "final_checkpoint": False}, 1),
        ({"checkpoint_minutes": 5.0}, 3),
        ({"checkpoint_steps": 1, "keep_checkpoints": 1, "keep_best": True}, 3),
        ({"keep_best": True}, 2),
        ({"evaluation_steps": 1, "keep_best": True}, 4),
    ],
)
def test_the_disk_must_hold_the_checkpoints_that_exist_at_once(
    training: dict[str, Any], count: int, tmp_path: Path
) -> None:
    check = checks._checkpoints(load_plan(write_plan(tmp_path / "plan", 2, **training)), tmp_path, 0)
    assert check.name == f"disk for {count} checkpoint{'s' if count > 1 else ''}"


def test_swap_files_on_the_drive_of_the_checkpoints_are_added(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_plan(tmp_path / "plan", 2, model=SWAPPED, tile=16, offload="nvme", nvme_path=tmp_path)
    plan = load_plan(folder)
    files = 2 * plan.prediction.highest(Tier.NVME)
    states = 12 * count_parameters(plan.model).total
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(checks.shutil, "disk_usage", lambda path: usage._replace(free=files + states))
    assert checks._checkpoints(plan, tmp_path, 0).passed
    monkeypatch.setattr(checks.shutil, "disk_usage", lambda path: usage._replace(free=files + states - 1))
    check = checks._checkpoints(plan, tmp_path, 0)
    assert not check.passed
    assert check.name == "disk for 1 checkpoint and the NVMe folder, which are on one drive"
    assert check.text.endswith("free space, use another drive, or save less (keep_checkpoints, checkpoint_steps, "
                               "final_checkpoint)")  # fmt: skip
    with tempfile.TemporaryDirectory(dir="/dev/shm") as other:
        assert checks._checkpoints(plan, Path(other), 0).name == "disk for 1 checkpoint"


def test_what_a_killed_run_left_is_not_needed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its swap files are deleted, and the checkpoint that is resumed exists."""
    folder = write_plan(tmp_path / "plan", 2, model=SWAPPED, tile=16, offload="nvme", nvme_path=tmp_path)
    plan = load_plan(folder)
    files, states = 2 * plan.prediction.highest(Tier.NVME), 12 * count_parameters(plan.model).total
    left = tmp_path / f"{PREFIX}0123456789ab-rank0" / "zero_stage_3" / "optimizer" / "rank0" / "1.tensor.swp"
    left.parent.mkdir(parents=True)
    (tmp_path / f"{PREFIX}0123456789ab-rank0" / "owner").write_text("a dead process")
    left.write_bytes(bytes(1000))
    usage = shutil.disk_usage(tmp_path)
    for free, fits in ((files - 1000, True), (files - 1001, False)):
        monkeypatch.setattr(checks.shutil, "disk_usage", lambda path, free=free: usage._replace(free=free))
        assert checks._checkpoints(plan, tmp_path, states).passed is fits
        assert next(check for check in checks._nvme(plan, tmp_path) if "folder" in check.name).passed is fits


def test_what_dead_ranks_left_in_memory_and_on_a_drive_of_an_earlier_plan_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The plan of an earlier run names the drive, which the plan of today does not use."""
    memory, drive, now = tmp_path / "shm", tmp_path / "drive", time.time()
    monkeypatch.setattr(filesystem, "SHARED_MEMORY", memory)
    monkeypatch.setattr(filesystem.time, "time", lambda: now + filesystem.STARTING_SECONDS + 60)
    left = drive / f"{PREFIX}0123456789ab-rank0"
    for folder in (memory, left):
        folder.mkdir(parents=True)
    for rank in range(2):
        (memory / f"deepspeed_allreduce_buffer_{os.getuid()}_127.0.0.1_29500_{rank}").write_bytes(bytes(8192))
    (left / "owner").write_text("a dead process")
    (left / "1.tensor.swp").write_bytes(bytes(2048))
    folder = write_plan(tmp_path / "plan", 2, model=SWAPPED, tile=16, offload="nvme", nvme_path=drive)
    new_run_folder(folder, None)
    write_plan(folder, 2, force=True)
    assert run(["preflight", str(folder)]) == 0
    printed = capsys.readouterr().out
    assert "ok      shared memory: removed 2 stale buffers, 16.00 KiB\n" in printed
    assert f"ok      NVMe folder {drive}: removed 2.00 KiB that dead runs left\n" in printed
    assert not list(memory.iterdir())
    assert not list(drive.iterdir())
    assert run(["preflight", str(folder)]) == 0
    printed = capsys.readouterr().out
    assert "ok      shared memory: no stale buffer\n" in printed
    assert "NVMe" not in printed


def test_another_process_asks_a_gpu_for_its_free_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The asking process holds a context, which the launcher must not hold while its ranks run."""
    asked = tmp_path / "asked"
    (tmp_path / "torch.py").write_text(
        "import os\n"
        "class cuda:\n"
        "    def device_count(): return 2\n"
        f"    def mem_get_info(n): open({str(asked)!r}, 'w').write(str(os.getpid())); return 100 + n, 1000\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert checks._free_gpu_bytes(1) == [100]
    assert checks._free_gpu_bytes(8) == [100, 101]
    assert int(asked.read_text()) != os.getpid()
    (tmp_path / "torch.py").write_text("raise RuntimeError('no driver')")
    with pytest.raises(InputError, match="GPUs: their free memory cannot be read: RuntimeError: no driver"):
        checks._free_gpu_bytes(1)
