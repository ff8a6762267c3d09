"""Optimizers' updates, copies between host and device, and the drive: one rate each, or why there is none."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from translution.distributed.system import remove_stale_locks
from translution.planner.common import GIB, MIB

from .machine import Context
from .ops import is_compiled
from .results import read_json

_REPEATS = 3


@contextlib.contextmanager
def _scratch_file() -> Iterator[Path]:
    """Yield the path of a file on the drive of the temporary folder, removed afterwards."""
    with tempfile.TemporaryDirectory(prefix="translution-drive-") as folder:
        yield Path(folder) / "data.bin"


def measure_transfers(context: Context) -> None:
    """Measure every rate; one that cannot be measured has its reason instead.

    Raises:
        SystemExit: if nothing could be measured, or the host's Adam could not.
    """
    remove_stale_locks()
    rows = [*_optimizers(context), *_copies(context), *_drive(context)]
    for what, unit, work in rows:
        row: dict[str, Any] = {"what": what, "unit": unit, "per_second": None, "error": ""}
        try:
            row["per_second"] = work()
        except Exception as error:  # Each of these may be missing on a machine.
            row["error"] = f"{type(error).__name__}: {' '.join(str(error).split())[:240]}"
        context.result.add("rates", row)
        context.result.note(json.dumps(row))
        known = [own for own in context.result.data["rates"] if own["per_second"]]
        context.result.say(", ".join(f"{own['what']} {own['per_second'] / 1e9:.3g} G{own['unit']}/s" for own in known))
    if any(row["error"] for row in context.result.data["rates"] if row["what"] == "CPU Adam"):
        raise SystemExit("the host's Adam could not be measured")


def _seconds(context: Context, work: Callable[[], object]) -> float:
    """Return the median seconds of a call, after one that is not counted."""
    import torch

    def wait() -> None:
        if context.device == "cuda":
            torch.cuda.synchronize()

    work()
    times = []
    for _ in range(_REPEATS):
        wait()
        began = time.perf_counter()
        work()
        wait()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


Rate = tuple[str, str, Callable[[], float]]
"""What, its unit, and the function that measures it per second."""


def _optimizers(context: Context) -> Iterator[Rate]:
    import torch

    size = 2**18 if context.small else 2**27
    device = context.device

    def update(where: str, make: Callable[[list[torch.nn.Parameter]], Any]) -> float:
        parameter = torch.nn.Parameter(torch.ones(size, device=where))
        parameter.grad = torch.ones_like(parameter)
        return size / _seconds(context, make([parameter]).step)

    def cpu_adam(parameters: list[torch.nn.Parameter]) -> Any:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return DeepSpeedCPUAdam(parameters)

    def fused_adam(parameters: list[torch.nn.Parameter]) -> Any:
        if not is_compiled(read_json(context.out / "ops.json").get("data", {}), "FusedAdamBuilder"):
            raise RuntimeError("the op is not compiled")
        from deepspeed.ops.adam import FusedAdam

        return FusedAdam(parameters)

    yield "CPU Adam", "parameters", lambda: update("cpu", cpu_adam)
    yield "torch AdamW", "parameters", lambda: update(device, lambda own: torch.optim.AdamW(own, foreach=False))
    yield "torch fused AdamW", "parameters", lambda: update(device, lambda own: torch.optim.AdamW(own, fused=True))
    if device == "cuda":
        yield "DeepSpeed FusedAdam", "parameters", lambda: update(device, fused_adam)


def _copies(context: Context) -> Iterator[Rate]:
    import torch

    size = MIB if context.small else GIB

    def copy(*, pinned: bool, to_host: bool) -> float:
        host = torch.ones(size, dtype=torch.uint8, pin_memory=pinned)
        device = torch.ones(size, dtype=torch.uint8, device=context.device)
        pair = (host, device) if to_host else (device, host)
        return size / _seconds(context, lambda: pair[0].copy_(pair[1], non_blocking=pinned))

    kinds = (False, True) if context.device == "cuda" else (False,)
    for pinned in kinds:
        for to_host in (False, True):
            name = f"{'device to host' if to_host else 'host to device'}, {'pinned' if pinned else 'pageable'}"
            yield name, "B", functools.partial(copy, pinned=pinned, to_host=to_host)


def _drive(context: Context) -> Iterator[Rate]:
    size = MIB if context.small else GIB
    builds = is_compiled(read_json(context.out / "ops.json").get("data", {}), "AsyncIOBuilder")

    def write(path: Path) -> float:
        block, began = memoryview(bytes(min(size, 64 * MIB))), time.perf_counter()
        with path.open("wb", buffering=0) as file:
            for _ in range(size // len(block)):
                file.write(block)
            os.fsync(file.fileno())
        return size / (time.perf_counter() - began)

    def plain_write() -> float:
        with _scratch_file() as path:
            return write(path)

    def plain_read() -> float:
        with _scratch_file() as path:
            write(path)
            with path.open("rb", buffering=0) as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                began = time.perf_counter()
                while file.read(16 * MIB):
                    pass
            return size / (time.perf_counter() - began)

    def through_library(*, reads: bool) -> float:
        import torch

        from translution.distributed.system import io_handle

        handle = io_handle()
        buffer = handle.new_cpu_locked_tensor(size, torch.empty(0, dtype=torch.uint8))
        try:
            with _scratch_file() as path:
                began = time.perf_counter()
                handle.sync_pwrite(buffer, str(path), 0)
                if reads:
                    began = time.perf_counter()
                    handle.sync_pread(buffer, str(path), 0)
                return size / (time.perf_counter() - began)
        finally:
            handle.free_cpu_locked_tensor(buffer)

    yield "drive written, plain files", "B", plain_write
    yield "drive read, plain files", "B", plain_read
    if builds:
        yield "drive written, DeepSpeed's library", "B", lambda: through_library(reads=False)
        yield "drive read, DeepSpeed's library", "B", lambda: through_library(reads=True)
