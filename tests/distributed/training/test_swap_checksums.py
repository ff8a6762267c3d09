"""A swap file that changes between a write and a read is noticed, and nothing else is taken for a change."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from translution.distributed.training import swap_checksums
from translution.distributed.training.swap_checksums import (
    CHECKED_BYTES,
    CheckedHandle,
    SwapChangedError,
    SwapChecksums,
)


class FakeHandle:
    """DeepSpeed's I/O handle, whose asynchronous operations happen in `wait`."""

    def __init__(self) -> None:
        self.pending: list[Callable[[], object]] = []
        self.result = 0

    def _begin(self, work: Callable[[], object]) -> int:
        if self.result >= 0:
            self.pending.append(work)
        return self.result

    def async_pwrite(self, buffer: Tensor, filename: str | int, file_offset: int = 0) -> int:
        return self._begin(lambda: self._write(buffer, filename, file_offset))

    def async_pread(self, buffer: Tensor, filename: str, file_offset: int = 0) -> int:
        return self._begin(lambda: self._read(buffer, filename, file_offset))

    def sync_pwrite(self, buffer: Tensor, filename: str, file_offset: int = 0) -> int:
        return self.result if self.async_pwrite(buffer, filename, file_offset) < 0 else self.wait()

    def sync_pread(self, buffer: Tensor, filename: str, file_offset: int = 0) -> int:
        return self.result if self.async_pread(buffer, filename, file_offset) < 0 else self.wait()

    def pwrite(self, buffer: Tensor, filename: str, validate: bool, asynchronous: bool, file_offset: int = 0) -> int:
        return (self.async_pwrite if asynchronous else self.sync_pwrite)(buffer, filename, file_offset)

    def pread(self, buffer: Tensor, filename: str, validate: bool, asynchronous: bool, file_offset: int = 0) -> int:
        return (self.async_pread if asynchronous else self.sync_pread)(buffer, filename, file_offset)

    def write(self, buffer: Tensor, filename: str, validate: bool, file_offset: int = 0) -> int:
        self._write(buffer, filename, file_offset)
        return 0

    def read(self, buffer: Tensor, filename: str, validate: bool, file_offset: int = 0) -> int:
        self._read(buffer, filename, file_offset)
        return 0

    def wait(self) -> int:
        pending, self.pending = self.pending, []
        for work in pending:
            work()
        return len(pending)

    def is_pinned(self, buffer: Tensor) -> bool:
        return buffer.numel() == 1

    @staticmethod
    def _write(buffer: Tensor, filename: str | int, offset: int) -> None:
        path = Path(filename) if isinstance(filename, str) else Path(f"/proc/self/fd/{filename}")
        path.touch()
        with path.open("r+b") as file:
            file.seek(offset)
            file.write(buffer.view(torch.uint8).numpy().tobytes())

    @staticmethod
    def _read(buffer: Tensor, filename: str, offset: int) -> None:
        with Path(filename).open("rb") as file:
            file.seek(offset)
            content = bytearray(file.read(buffer.nbytes))
        buffer.view(torch.uint8)[: len(content)] = torch.frombuffer(content, dtype=torch.uint8)


class Swap:
    """A file and a checked handle.

    Args:
        folder: folder for the file.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        self.path = str(folder / "exp_avg-1_1.tensor.swp")
        self.checksums, self.fake = SwapChecksums(3), FakeHandle()
        self.handle: Any = CheckedHandle(self.fake, self.checksums)

    def write(self, values: Tensor, offset: int = 0) -> None:
        assert self.handle.async_pwrite(values, self.path, offset) == 0
        assert self.handle.wait() == 1

    def read(self, bytes_: int, offset: int = 0) -> Tensor:
        buffer = torch.zeros(bytes_, dtype=torch.uint8)
        assert self.handle.async_pread(buffer, self.path, offset) == 0
        assert self.handle.wait() == 1
        return buffer

    def change(self, position: int) -> None:
        content = bytearray(Path(self.path).read_bytes())
        content[position] ^= 1
        Path(self.path).write_bytes(content)


@pytest.fixture
def swap(tmp_path: Path) -> Swap:
    return Swap(tmp_path / "zero_stage_3" / "optimizer" / "rank3")


def values(bytes_: int, seed: int = 0) -> Tensor:
    return torch.randint(256, (bytes_,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def test_what_was_written_is_read(swap: Swap) -> None:
    written = values(CHECKED_BYTES + 5000)
    swap.write(written)
    assert torch.equal(swap.read(written.numel()), written)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        swap.write(torch.randn(4096).to(dtype).requires_grad_())
        swap.read(4096 * dtype.itemsize)
    assert swap.handle.is_pinned(torch.zeros(1))


@pytest.mark.parametrize("digest", ["xxhash", "zlib"])
def test_one_bit_that_changes_is_named(digest: str, swap: Swap, monkeypatch: pytest.MonkeyPatch) -> None:
    if digest == "zlib":
        monkeypatch.setattr(swap_checksums, "_digest", swap_checksums.zlib.crc32)
    swap.write(values(CHECKED_BYTES + 5000))
    swap.change(CHECKED_BYTES + 4999)
    with pytest.raises(SwapChangedError) as error:
        swap.read(CHECKED_BYTES + 5000)
    assert str(error.value) == (
        f"rank 3: swap file {swap.path} changed on the drive: it holds exp_avg, and bytes {CHECKED_BYTES} to "
        f"{CHECKED_BYTES + 5000} differ from what was written; check the drive, and resume from the newest checkpoint "
        "(translution launch PLAN_FOLDER --resume)"
    )
    assert torch.equal(swap.read(CHECKED_BYTES), values(CHECKED_BYTES + 5000)[:CHECKED_BYTES])


@pytest.mark.parametrize("method", ["async", "sync", "parallel", "parallel async", "plain"])
def test_every_way_to_write_and_read_is_checked(method: str, swap: Swap) -> None:
    handle, written, buffer = swap.handle, values(6000), torch.zeros(6000, dtype=torch.uint8)
    waits = "async" in method
    write, read = {
        "async": (handle.async_pwrite, handle.async_pread),
        "sync": (handle.sync_pwrite, handle.sync_pread),
        "parallel": (lambda *a: handle.pwrite(*a, False, False), lambda *a: handle.pread(*a, False, False)),
        "parallel async": (lambda *a: handle.pwrite(*a, False, True), lambda *a: handle.pread(*a, False, True)),
        "plain": (lambda *a: handle.write(*a, False), lambda *a: handle.read(*a, False)),
    }[method]
    write(values(6000, seed=1), swap.path)
    if waits:
        handle.wait()
    write(written, swap.path)
    if waits:
        handle.wait()
    swap.change(77)
    with pytest.raises(SwapChangedError):  # noqa: PT012 - an asynchronous read raises in its wait
        read(buffer, swap.path)
        handle.wait()
    swap.change(77)
    read(buffer, swap.path)
    if waits:
        handle.wait()
    assert torch.equal(buffer, written)


def test_a_synchronous_operation_ends_reads_that_are_under_way(swap: Swap) -> None:
    swap.write(values(6000))
    swap.change(0)
    for end in (lambda: swap.handle.sync_pwrite(values(8), f"{swap.path}2"),
                lambda: swap.handle.sync_pread(torch.zeros(8, dtype=torch.uint8), f"{swap.path}2")):  # fmt: skip
        swap.handle.async_pread(torch.zeros(6000, dtype=torch.uint8), swap.path)
        with pytest.raises(SwapChangedError):
            end()


def test_other_ranges_than_those_written_are_compared_where_they_can_be(swap: Swap) -> None:
    swap.write(values(3 * CHECKED_BYTES))
    swap.change(CHECKED_BYTES + 1)
    swap.read(CHECKED_BYTES)
    swap.read(100, offset=CHECKED_BYTES)  # Part of a block: nothing is known of it.
    swap.read(CHECKED_BYTES, offset=2 * CHECKED_BYTES)
    with pytest.raises(SwapChangedError, match=f"bytes {CHECKED_BYTES} to {2 * CHECKED_BYTES} differ"):
        swap.read(2 * CHECKED_BYTES, offset=CHECKED_BYTES - 10)
    # A second write of a part of the block: only this part is known.
    swap.write(values(100, seed=2), offset=CHECKED_BYTES + 50)
    assert torch.equal(swap.read(100, offset=CHECKED_BYTES + 50), values(100, seed=2))
    swap.read(3 * CHECKED_BYTES)


def test_files_that_nobody_wrote_through_a_handle_are_not_compared(swap: Swap) -> None:
    Path(swap.path).write_bytes(bytes(8192))
    swap.read(8192)
    swap.write(values(8192))
    with Path(swap.path).open("r+b") as file:
        swap.handle.async_pwrite(values(10, seed=4), file.fileno(), 0)
        swap.handle.wait()
    swap.read(8192)
    swap.write(values(8192))
    swap.checksums.forget("optimizer")
    swap.change(0)
    swap.read(8192)


def test_an_operation_that_fails_is_left_to_deepspeed(swap: Swap) -> None:
    swap.write(values(8192))
    swap.fake.result = -1
    buffer = torch.zeros(8192, dtype=torch.uint8)
    assert swap.handle.async_pread(buffer, swap.path) == -1
    assert swap.handle.sync_pread(buffer, swap.path) == -1
    assert swap.handle.wait() == 0
    # Nobody knows what the file holds.
    assert swap.handle.async_pwrite(values(8192, seed=1), swap.path) == -1
    swap.fake.result = 0
    swap.read(8192)


def test_bytes_that_are_written_again_while_they_are_read_are_not_compared(swap: Swap) -> None:
    swap.write(values(8192))
    other: Any = CheckedHandle(FakeHandle(), swap.checksums)
    buffer = torch.zeros(8192, dtype=torch.uint8)
    swap.handle.async_pread(buffer, swap.path)
    other.async_pwrite(values(8192, seed=1), swap.path)
    swap.handle.wait()
    assert torch.equal(buffer, values(8192))
    other.wait()
    swap.read(8192)


def test_a_file_that_is_cut_or_removed_is_named_before_deepspeed_aborts(swap: Swap) -> None:
    swap.write(values(8192))
    with Path(swap.path).open("r+b") as file:
        file.truncate(8000)
    with pytest.raises(SwapChangedError, match="it holds exp_avg, and it has 8000 of 8192 bytes; "):
        swap.read(8192)
    Path(swap.path).unlink()
    with pytest.raises(SwapChangedError, match="it holds exp_avg, and it is missing; "):
        swap.read(8192)


def test_the_files_that_a_checkpoint_copies_are_compared(swap: Swap, tmp_path: Path) -> None:
    swap.write(values(2 * CHECKED_BYTES + 1))
    gradient = swap.path.replace("exp_avg-1_1", "1_1_gradient_0_100")
    parameters = tmp_path / "zero_stage_3" / "float32params" / "rank3" / "1_param.tensor.swp"
    parameters.parent.mkdir(parents=True)
    for path in (gradient, str(parameters)):
        swap.handle.sync_pwrite(values(100), path)
        Path(path).write_bytes(bytes(100))
    swap.checksums.compare_files("optimizer")
    swap.change(2 * CHECKED_BYTES)
    with pytest.raises(SwapChangedError, match=f"bytes {2 * CHECKED_BYTES} to {2 * CHECKED_BYTES + 1} differ"):
        swap.checksums.compare_files("optimizer")
