"""A rank's own folder on an NVMe drive: locked while its process lives, and removed when it is dead."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from translution.distributed.system import nvme_swap
from translution.distributed.system.nvme_swap import SwapFolder, living_owners, remove_stale, stale_bytes
from translution.planner.common.errors import InputError

HOLD = """
import sys
from pathlib import Path
from translution.distributed.system.nvme_swap import SwapFolder
folder = SwapFolder(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
(folder.path / "zero_stage_3").mkdir()
(folder.path / "zero_stage_3" / "a.swp").write_bytes(bytes(1000))
print(folder.path, flush=True)
sys.stdin.readline()
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that holds the folder of rank 0 of a run."""
    command = [sys.executable, "-c", HOLD, str(tmp_path / "drive"), str(tmp_path / "run"), "0"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith(str(tmp_path / "drive"))
        yield process
        process.kill()


@pytest.fixture(autouse=True)
def short_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvme_swap, "_PATIENCE_S", 0.2)


def drive(tmp_path: Path) -> str:
    return str(tmp_path / "drive")


def test_every_run_and_rank_has_its_own_folder(tmp_path: Path) -> None:
    made = [SwapFolder(drive(tmp_path), tmp_path / run, rank) for run in ("a", "b") for rank in (0, 1)]
    assert len({folder.path for folder in made}) == 4
    assert len(living_owners(drive(tmp_path))) == 4
    for folder in made:
        folder.remove()
    assert not list((tmp_path / "drive").iterdir())


def test_a_living_process_keeps_its_folder(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    with pytest.raises(InputError, match=rf"nvme_path: .*/run, process {holder.pid} uses it for rank 0"):
        SwapFolder(drive(tmp_path), tmp_path / "run", 0)
    other = SwapFolder(drive(tmp_path), tmp_path / "other", 0)
    assert living_owners(drive(tmp_path)) != []
    remove_stale(drive(tmp_path))
    assert stale_bytes(drive(tmp_path)) == 0
    assert len(list((tmp_path / "drive").rglob("*.swp"))) == 1
    other.remove()


def test_what_a_killed_process_left_is_removed_by_the_next(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    holder.kill()
    holder.wait()
    assert stale_bytes(drive(tmp_path)) == 1000
    assert living_owners(drive(tmp_path)) == []
    folder = SwapFolder(drive(tmp_path), tmp_path / "run", 0)
    assert stale_bytes(drive(tmp_path)) == 0
    assert [path.name for path in folder.path.iterdir()] == ["owner"]
    folder.remove()


def test_what_a_process_killed_during_its_removal_left_is_removed(tmp_path: Path) -> None:
    """As the launcher kills the other ranks when one fails: some have begun to remove their folders."""
    program = """
import os, shutil, sys
from pathlib import Path
from translution.distributed.system.nvme_swap import OWNER, SwapFolder

def remove_some(path, **_):
    (Path(path) / OWNER).unlink()
    os._exit(9)

folder = SwapFolder(sys.argv[1], Path("run"), 0)
(folder.path / "moments.swp").write_bytes(bytes(64))
shutil.rmtree = remove_some
folder.remove()
"""
    assert subprocess.run([sys.executable, "-c", program, tmp_path]).returncode == 9
    assert len(list(tmp_path.rglob("*.swp"))) == 1
    remove_stale(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_files_of_others_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither another user's folder nor one without a lock is taken for stale."""
    mine = SwapFolder(drive(tmp_path), tmp_path / "run", 0)
    mine.remove()
    left = tmp_path / "drive" / f"{nvme_swap.PREFIX}0123456789ab-rank0"
    left.mkdir()
    remove_stale(drive(tmp_path))
    assert left.exists()
    (left / "owner").write_text("somebody")
    with monkeypatch.context() as patch:
        patch.setattr(nvme_swap.os, "getuid", lambda: 12345)
        remove_stale(drive(tmp_path))
    assert left.exists()
    remove_stale(drive(tmp_path))
    assert not left.exists()
    (tmp_path / "drive" / "zero_stage_3").mkdir()
    remove_stale(drive(tmp_path))
    assert (tmp_path / "drive" / "zero_stage_3").exists()


def test_bytes_are_counted_by_kind(tmp_path: Path) -> None:
    folder = SwapFolder(drive(tmp_path), tmp_path / "run", 0)
    for name, size in (("optimizer/rank0/exp_avg-1.tensor.swp", 3), ("optimizer/rank0/1.tensor.swp", 4),
                       ("float32params/rank0/2.tensor.swp", 5)):  # fmt: skip
        path = folder.path / "zero_stage_3" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(size))
    assert nvme_swap.disk_bytes(folder.path) == {"exp_avg": 3, "master parameters": 4, "parameters": 5}
    assert nvme_swap.disk_bytes(None) == {}
    folder.remove()


def test_ranks_that_start_at_once_after_a_crash_do_not_disturb_one_another(tmp_path: Path) -> None:
    """Each deletes what all of them have left, and takes its own folder."""
    script = HOLD + "folder.remove()\n"
    for attempt in range(3):
        processes = []
        for rank in range(4):
            command = [sys.executable, "-c", script, drive(tmp_path), str(tmp_path / "run"), str(rank)]
            processes.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline().strip().endswith(f"rank{processes.index(process)}")
        assert len(living_owners(drive(tmp_path))) == 4
        for process in processes:
            if attempt < 2:
                process.kill()
            process.communicate("end\n" if attempt == 2 else None)
    assert not list((tmp_path / "drive").iterdir())
