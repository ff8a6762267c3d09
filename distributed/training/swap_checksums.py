"""Checksums of what DeepSpeed's swappers write to NVMe, kept in memory and compared with what they read back.

A drive, a driver or another program may change a swap file between two steps; without a checksum training continues
with the wrong values. `CheckedHandle` stands in front of an I/O handle of DeepSpeed: it notes the checksum of every
write and compares the buffer of every read once it has completed.

A file is divided into blocks of `CHECKED_BYTES`. Of each block the bytes that were written last are known, and a read
is compared where it covers all of them; a read of other ranges, or of files that nobody wrote through a handle, is not.

Source: DeepSpeed 0.19.8, csrc/aio/py_lib/py_ds_aio.cpp and deepspeed_py_io_handle.cpp.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from translution.planner.common import TranslutionError

from ..system.nvme_swap import kind_of_swap_file

CHECKED_BYTES = 4 * 2**20
"""Bytes of a file that have one checksum; a checksum takes some 200 bytes of memory."""


def _fastest_digest() -> Callable[[memoryview], int]:
    # xxhash comes with `datasets` and takes a tenth of the time. The values never leave the process.
    with suppress(ImportError):
        from xxhash import xxh3_64_intdigest

        return xxh3_64_intdigest
    return zlib.crc32


_digest = _fastest_digest()


class SwapChangedError(TranslutionError):
    """A swap file does not hold what was written to it."""


@dataclass(frozen=True, slots=True)
class _Written:
    """A range of a file and its checksum."""

    start: int
    end: int
    digest: int


def _bytes_of(buffer: Tensor) -> memoryview:
    view: memoryview = buffer.detach().view(torch.uint8).numpy().data
    return view.cast("B")


class SwapChecksums:
    """The checksums of one rank's swap files.

    Args:
        rank: number of the rank, for messages.
    """

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._files: dict[str, dict[int, _Written]] = {}

    def note(self, path: str, buffer: Tensor, offset: int) -> None:
        """Note what is being written.

        Args:
            path: the file.
            buffer: contiguous tensor in host memory.
            offset: position in the file in bytes.
        """
        view, end = _bytes_of(buffer), offset + buffer.nbytes
        blocks = self._files.setdefault(path, {})
        for number in range(offset // CHECKED_BYTES, -(-end // CHECKED_BYTES)):
            first, last = max(offset, number * CHECKED_BYTES), min(end, (number + 1) * CHECKED_BYTES)
            blocks[number] = _Written(first, last, _digest(view[first - offset : last - offset]))

    def forget(self, part: str) -> None:
        """Forget the files whose path has a part, such as the folder ``optimizer``: others will write them."""
        for path in [path for path in self._files if part in Path(path).parts]:
            del self._files[path]

    def forget_file(self, path: str) -> None:
        """Forget a file of unknown content."""
        self._files.pop(path, None)

    def written(self, path: str, offset: int, size: int) -> list[_Written]:
        """Return what is known of a range of a file that a read of this range can be compared with."""
        blocks, end = self._files.get(path, {}), offset + size
        numbers = range(offset // CHECKED_BYTES, -(-end // CHECKED_BYTES))
        found = [blocks[number] for number in numbers if number in blocks]
        return [block for block in found if offset <= block.start and block.end <= end]

    def require_size(self, path: str) -> None:
        """Check that a file has not become shorter: DeepSpeed would abort without a message.

        Raises:
            SwapChangedError: if it is missing or too short.
        """
        needed = max((block.end for block in self._files.get(path, {}).values()), default=0)
        try:
            size = Path(path).stat().st_size
        except FileNotFoundError:
            size = -1
        if size < needed:
            found = "is missing" if size < 0 else f"has {size} of {needed} bytes"
            raise SwapChangedError(self._message(path, f"it {found}"))

    def compare(self, path: str, buffer: Tensor, offset: int = 0) -> None:
        """Compare what was read with what was written.

        Args:
            path: the file.
            buffer: contiguous tensor in host memory.
            offset: position in the file in bytes.

        Raises:
            SwapChangedError: names the file, what it holds and the first block that differs.
        """
        self._compare(path, _bytes_of(buffer), offset, self.written(path, offset, buffer.nbytes))

    def compare_files(self, part: str) -> None:
        """Read and compare the files whose path has a part, except gradients: a checkpoint copies them.

        Args:
            part: folder in their paths, such as ``optimizer``.

        Raises:
            SwapChangedError: as `compare` does.
        """
        room = memoryview(bytearray(CHECKED_BYTES))
        for path, blocks in self._files.items():
            if part not in Path(path).parts or kind_of_swap_file(Path(path)) == "gradients":
                continue
            self.require_size(path)
            with Path(path).open("rb") as file:  # Buffered: an unbuffered read may return less than is asked for.
                for block in blocks.values():
                    view = room[: block.end - block.start]
                    file.seek(block.start)
                    file.readinto(view)
                    self._compare(path, view, block.start, [block])

    def _compare(self, path: str, view: memoryview, offset: int, blocks: list[_Written]) -> None:
        for block in blocks:
            if _digest(view[block.start - offset : block.end - offset]) != block.digest:
                differs = f"bytes {block.start} to {block.end} differ from what was written"
                raise SwapChangedError(self._message(path, differs))

    def _message(self, path: str, found: str) -> str:
        return (
            f"rank {self._rank}: swap file {path} changed on the drive: it holds {kind_of_swap_file(Path(path))}, and "
            f"{found}; check the drive, and resume from the newest checkpoint (translution launch PLAN_FOLDER --resume)"
        )


@dataclass(frozen=True, slots=True)
class _Read:
    """A read that has not completed."""

    buffer: Tensor
    path: str
    offset: int
    blocks: list[_Written]


class CheckedHandle:
    """An I/O handle of DeepSpeed whose reads are compared with earlier writes; it has all its methods.

    Args:
        handle: DeepSpeed's ``aio_handle``.
        checksums: the checksums of this rank, which all its handles share.
    """

    def __init__(self, handle: Any, checksums: SwapChecksums) -> None:
        self._handle, self.checksums = handle, checksums
        self._reads: list[_Read] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._handle, name)

    def _end_reads(self) -> None:
        reads, self._reads = self._reads, []
        for read in reads:
            # Bytes that were written again while they were read may be the old or the new ones.
            if self.checksums.written(read.path, read.offset, read.buffer.nbytes) == read.blocks:
                self.checksums.compare(read.path, read.buffer, read.offset)

    def _read(self, call: Callable[[], int], buffer: Tensor, path: str, offset: int, *, ends: bool) -> int:
        known = self.checksums.written(path, offset, buffer.nbytes)
        if known:
            self.checksums.require_size(path)
        result = call()
        if result >= 0 and known:
            self._reads.append(_Read(buffer, path, offset, known))
        if result >= 0 and ends:
            # A synchronous operation waits for all that the handle has begun.
            self._end_reads()
        return result

    def _write(self, call: Callable[[], int], buffer: Tensor, path: str | int, offset: int, *, ends: bool) -> int:
        result = call()
        if not isinstance(path, str):
            self.checksums.forget_file(str(Path(f"/proc/self/fd/{path}").readlink()))
        elif result < 0 or buffer.device.type != "cpu":
            self.checksums.forget_file(path)
        else:
            # An asynchronous write may still be under way, and nobody changes its buffer until it has completed.
            self.checksums.note(path, buffer, offset)
        if result >= 0 and ends:
            self._end_reads()
        return result

    def async_pread(self, buffer: Tensor, filename: str, file_offset: int = 0) -> int:
        """Begin to read; `wait` compares."""
        call = partial(self._handle.async_pread, buffer, filename, file_offset)
        return self._read(call, buffer, filename, file_offset, ends=False)

    def sync_pread(self, buffer: Tensor, filename: str, file_offset: int = 0) -> int:
        """Read and compare."""
        call = partial(self._handle.sync_pread, buffer, filename, file_offset)
        return self._read(call, buffer, filename, file_offset, ends=True)

    def pread(self, buffer: Tensor, filename: str, validate: bool, asynchronous: bool, file_offset: int = 0) -> int:
        """Read, or begin to; compare once it has completed."""
        call = partial(self._handle.pread, buffer, filename, validate, asynchronous, file_offset)
        return self._read(call, buffer, filename, file_offset, ends=not asynchronous)

    def read(self, buffer: Tensor, filename: str, validate: bool, file_offset: int = 0) -> int:
        """Read in this thread and compare; reads that are under way stay so."""
        under_way, self._reads = self._reads, []
        try:
            call = partial(self._handle.read, buffer, filename, validate, file_offset)
            return self._read(call, buffer, filename, file_offset, ends=True)
        finally:
            self._reads = under_way

    def async_pwrite(self, buffer: Tensor, filename: str | int, file_offset: int = 0) -> int:
        """Begin to write to a path or a descriptor, and note the checksum."""
        call = partial(self._handle.async_pwrite, buffer, filename, file_offset)
        return self._write(call, buffer, filename, file_offset, ends=False)

    def sync_pwrite(self, buffer: Tensor, filename: str, file_offset: int = 0) -> int:
        """Write and note the checksum."""
        call = partial(self._handle.sync_pwrite, buffer, filename, file_offset)
        return self._write(call, buffer, filename, file_offset, ends=True)

    def pwrite(self, buffer: Tensor, filename: str, validate: bool, asynchronous: bool, file_offset: int = 0) -> int:
        """Write, or begin to, and note the checksum."""
        call = partial(self._handle.pwrite, buffer, filename, validate, asynchronous, file_offset)
        return self._write(call, buffer, filename, file_offset, ends=not asynchronous)

    def write(self, buffer: Tensor, filename: str, validate: bool, file_offset: int = 0) -> int:
        """Write in this thread and note the checksum."""
        call = partial(self._handle.write, buffer, filename, validate, file_offset)
        return self._write(call, buffer, filename, file_offset, ends=False)

    def wait(self) -> int:
        """Wait for all operations that have begun, compare what was read, and return their number.

        Raises:
            SwapChangedError: names the first file that has changed.
        """
        completed: int = self._handle.wait()
        self._end_reads()
        return completed
