"""The ranks' status files, and not the launcher's exit code, decide whether a run succeeded; compiled ops."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers.runs import write_plan
from torch.utils.file_baton import FileBaton

from translution.distributed.runs.folder import make_run_folders, status_path
from translution.distributed.runs.status import RankStatus, raise_unless_finished, read_status, write_status
from translution.distributed.system import compiled_ops as ops
from translution.distributed.system.compiled_ops import remove_stale_locks
from translution.planner.common.errors import InputError, RunFailedError


@pytest.fixture
def run(tmp_path: Path) -> Path:
    for name in ("run", "plan"):
        (tmp_path / name).mkdir()
    (tmp_path / "plan" / "plan.json").write_text("{}")
    make_run_folders(tmp_path / "run", tmp_path / "plan")
    return tmp_path / "run"


def report(run: Path, rank: int, state: str, message: str = "") -> None:
    write_status(run, RankStatus.model_validate({"rank": rank, "state": state, "step": 7, "message": message}))


def test_all_finished_is_success_even_with_a_bad_exit_code(run: Path) -> None:
    report(run, 0, "finished")
    report(run, 1, "finished")
    raise_unless_finished(run, 2, exit_code=134)


def test_an_unfinished_rank_is_a_failure_even_with_exit_code_zero(run: Path) -> None:
    report(run, 0, "finished")
    report(run, 1, "training")
    with pytest.raises(RunFailedError, match="rank 1 was last seen training at step 7; launcher exit code 0"):
        raise_unless_finished(run, 2, exit_code=0)


def test_a_rank_that_never_started_is_named(run: Path) -> None:
    with pytest.raises(RunFailedError, match="rank 0 never started; rank 1 never started"):
        raise_unless_finished(run, 2, exit_code=0)


def test_a_failed_rank_is_named_first(run: Path) -> None:
    report(run, 0, "training")
    report(run, 1, "failed", "FloatingPointError: loss is nan")
    with pytest.raises(RunFailedError, match="rank 1 failed at step 7: FloatingPointError: loss is nan"):
        raise_unless_finished(run, 2, exit_code=1)


def test_only_the_given_ranks_are_checked(run: Path) -> None:
    report(run, 5, "finished")
    raise_unless_finished(run, [5], exit_code=0)
    with pytest.raises(RunFailedError, match="rank 4 never started"):
        raise_unless_finished(run, [4], exit_code=0)


def test_a_damaged_status_is_named(run: Path) -> None:
    status_path(run, 0).write_text("{")
    with pytest.raises(InputError, match=r"rank_0.json: not valid JSON"):
        read_status(run, 0)


def test_only_a_lock_that_no_process_holds_is_removed(tmp_path: Path) -> None:
    """A killed compilation leaves its lock, and every later run would wait for it forever."""
    for name in ("killed", "compiling"):
        (tmp_path / name).mkdir()
    stale, held = tmp_path / "killed" / "lock", tmp_path / "compiling" / "lock"
    batons = [FileBaton(str(path)) for path in (stale, held)]
    assert all(baton.try_acquire() for baton in batons)
    os.close(batons[0].fd)
    assert remove_stale_locks({"TORCH_EXTENSIONS_DIR": str(tmp_path)}) == [stale]
    assert not stale.exists()
    assert held.exists()
    batons[1].release()


def compilers(folder: Path) -> list[int]:
    """Return the processes that compile into a folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if f"TORCH_EXTENSIONS_DIR={folder}".encode() in path.read_bytes():
                found.append(int(path.parent.name))
    return found


def test_a_killed_compilation_leaves_no_lock_that_blocks_the_next(
    tmp_path: Path,
) -> None:
    folder, extensions = write_plan(tmp_path / "plan", 1), tmp_path / "extensions"
    command = [sys.executable, "-m", "translution.cli", "launch", str(folder)]
    environment = os.environ | {"TORCH_EXTENSIONS_DIR": str(extensions)}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 120
        while not (locks := list(extensions.glob("**/lock"))):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        (compiling,) = [
            pid for pid in compilers(extensions) if "-c" in arguments_of(pid) and int(parent_of(pid)) == process.pid
        ]
        os.kill(compiling, signal.SIGKILL)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 1
    assert errors.count("\n") == 1
    assert "DeepSpeed's ops do not compile: ShareMemCommBuilder" in errors
    assert not compilers(extensions)
    assert all(lock.exists() for lock in locks)
    assert remove_stale_locks(environment) == locks


def arguments_of(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/cmdline").read_text().split("\0")


def parent_of(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]


def test_compiled_ops_are_not_loaded_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    library = tmp_path / "cpu_adam" / "cpu_adam.so"
    library.parent.mkdir()
    loaded: list[list[str]] = []

    def compile_them(names: list[str], *_: object) -> int:
        loaded.append(names)
        library.touch()
        return 0

    monkeypatch.setattr(ops, "_compile", compile_them)

    def prepare(*names: str, **environment: str) -> int:
        before = len(loaded)
        ops.prepare_ops(names, environment, tmp_path / "log")
        return len(loaded) - before

    assert prepare("CPUAdamBuilder") == 1
    assert prepare("CPUAdamBuilder") == 0
    assert prepare("CPUAdamBuilder", "AsyncIOBuilder") == 1
    assert prepare("AsyncIOBuilder") == prepare("CPUAdamBuilder") == 0
    assert prepare("CPUAdamBuilder", CXX="another") == 1
    assert prepare("CPUAdamBuilder") == 1
    os.utime(library, ns=(1, 1))  # Another process has compiled it again.
    assert prepare("CPUAdamBuilder") == 1
    assert prepare("CPUAdamBuilder") == 0
    library.unlink()
    assert prepare("CPUAdamBuilder") == 1
    (tmp_path / "translution-prepared.json").write_text("{")
    assert prepare("CPUAdamBuilder") == 1
