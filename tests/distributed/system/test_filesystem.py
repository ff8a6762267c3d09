"""What killed ranks leave in shared memory is removed, and nothing that somebody uses."""

from __future__ import annotations

import mmap
import os
import time
from pathlib import Path

import pytest

from translution.distributed.system import filesystem
from translution.distributed.system.filesystem import STARTING_SECONDS, remove_dead_buffers

SIZE = 8192


@pytest.fixture
def shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in the place of /dev/shm."""
    monkeypatch.setattr(filesystem, "SHARED_MEMORY", tmp_path)
    return tmp_path


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything is older than ranks need to start."""
    now = time.time()
    monkeypatch.setattr(filesystem.time, "time", lambda: now + STARTING_SECONDS + 60)


def buffer(folder: Path, rank: int, user: int | None = None) -> Path:
    name = f"deepspeed_allreduce_buffer_{os.getuid() if user is None else user}_127.0.0.1_29500_{rank}"
    (folder / name).write_bytes(bytes(SIZE))
    return folder / name


@pytest.mark.usefixtures("later")
def test_buffers_that_no_process_uses_are_removed(shared: Path) -> None:
    for rank in range(2):
        buffer(shared, rank)
    assert remove_dead_buffers() == [SIZE, SIZE]
    assert not list(shared.iterdir())
    assert remove_dead_buffers() == []


@pytest.mark.usefixtures("later")
def test_a_buffer_that_is_mapped_or_open_stays(shared: Path) -> None:
    mapped, opened, dead = (buffer(shared, rank) for rank in range(3))
    with mapped.open("r+b") as file:
        mapping = mmap.mmap(file.fileno(), SIZE)
    with opened.open("rb"), mapping:
        assert remove_dead_buffers() == [SIZE]
    assert mapped.exists()
    assert opened.exists()
    assert not dead.exists()


def test_a_buffer_that_ranks_may_be_about_to_map_stays(shared: Path) -> None:
    path = buffer(shared, 0)
    # A file that is found and opened again keeps its old modification time.
    os.utime(path, (0, 0))
    assert remove_dead_buffers() == []
    assert path.exists()


@pytest.mark.usefixtures("later")
def test_what_is_not_a_buffer_of_this_user_stays(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = [buffer(shared, 0, user=os.getuid() + 1), shared / "another"]
    kept[1].touch()
    link = buffer(shared, 1).with_name(f"deepspeed_allreduce_buffer_{os.getuid()}_127.0.0.1_29500_2")
    link.symlink_to(kept[1])
    disguised = os.getuid() + 2
    kept += [link, buffer(shared, 0, user=disguised)]
    assert remove_dead_buffers() == [SIZE]
    # A file with this user's number in its name that belongs to another.
    monkeypatch.setattr(filesystem.os, "getuid", lambda: disguised)
    assert remove_dead_buffers() == []
    assert all(path.exists() for path in kept)
