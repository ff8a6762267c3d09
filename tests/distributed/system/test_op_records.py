"""The record of compiled ops loses nothing when several processes change it."""

from __future__ import annotations

import importlib.util
import os
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers.waiting import PATIENCE_S

from translution.distributed.system import filesystem
from translution.distributed.system.compile_times import OpDuration
from translution.distributed.system.op_records import note_prepared, read_durations, read_prepared, record_path


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    return {"TORCH_EXTENSIONS_DIR": str(tmp_path)}


def test_a_change_waits_for_the_change_of_another_process(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = record_path(environment)
    note_prepared("AsyncIOBuilder", environment, None)
    others = path.read_text()
    path.unlink()
    try_lock, waits = filesystem.try_lock, threading.Event()

    def look(path: Path, *, create: bool = False) -> int | None:
        if (descriptor := try_lock(path, create=create)) is None:
            waits.set()
        return descriptor

    held = try_lock(path.with_suffix(".lock"))
    assert held is not None
    monkeypatch.setattr(filesystem, "try_lock", look)
    monkeypatch.setattr(filesystem, "LOCK_PATIENCE_S", PATIENCE_S)
    thread = threading.Thread(target=note_prepared, args=("CPUAdamBuilder", environment, None))
    thread.start()
    try:
        assert waits.wait(PATIENCE_S)
        assert not path.exists()
        path.write_text(others)
    finally:
        os.close(held)
        thread.join()
    assert read_prepared(environment).ops == ("AsyncIOBuilder", "CPUAdamBuilder")


def test_a_lock_that_is_never_released_does_not_stop_a_launch(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(filesystem, "LOCK_PATIENCE_S", 0.05)
    held = filesystem.try_lock(record_path(environment).with_suffix(".lock"), create=True)
    assert held is not None
    note_prepared("CPUAdamBuilder", environment, None)
    os.close(held)
    assert read_prepared(environment).ops == ("CPUAdamBuilder",)


def test_a_file_system_without_locks_keeps_records(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: int) -> None:
        raise OSError("no locks available")

    monkeypatch.setattr(filesystem.fcntl, "flock", refuse)
    for op in ("CPUAdamBuilder", "AsyncIOBuilder"):
        note_prepared(op, environment, None)
    assert read_prepared(environment).ops == ("AsyncIOBuilder", "CPUAdamBuilder")


def test_the_own_time_counts_most_and_those_of_other_nodes_nothing(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    other = environment | {"CXX": "another"}
    note_prepared("CPUAdamBuilder", environment, OpDuration(seconds=1, jobs=1))
    note_prepared("CPUAdamBuilder", other, OpDuration(seconds=2, jobs=1))
    note_prepared("AsyncIOBuilder", other, OpDuration(seconds=3, jobs=1))
    found = read_durations(environment)
    assert {op: duration.seconds for op, duration in found.items()} == {"CPUAdamBuilder": 1, "AsyncIOBuilder": 3}
    monkeypatch.setattr("platform.node", lambda: "elsewhere")
    assert read_durations(environment) == {}
    assert read_prepared(environment).ops == ()


def test_nothing_fails_in_a_folder_that_does_not_exist(tmp_path: Path) -> None:
    environment = {"TORCH_EXTENSIONS_DIR": str(tmp_path / "absent")}
    note_prepared("CPUAdamBuilder", environment, None)
    assert read_prepared(environment).ops == ()
    assert read_durations(environment) == {}


def test_a_reinstalled_package_is_another_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its headers are newer than the compiled ops, which are therefore compiled again."""
    environment = {"TORCH_EXTENSIONS_DIR": str(tmp_path)}
    installed = tmp_path / "__init__.py"
    installed.touch()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: SimpleNamespace(origin=str(installed)))
    note_prepared("CPUAdamBuilder", environment, None)
    assert read_prepared(environment).ops == ("CPUAdamBuilder",)
    os.utime(installed, (1, 1))
    assert read_prepared(environment).ops == ()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert read_prepared(environment).ops == ()
