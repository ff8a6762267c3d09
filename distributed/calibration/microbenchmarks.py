"""Microbenchmarks of a rank: matrix products, memory, collectives, copies, optimizers, NVMe, DeepSpeed's engine.

All ranks run each of them at the same time, as in training.
"""

from __future__ import annotations

import os
import shutil
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from translution.planner.common import DTYPE_BYTES, Precision
from translution.planner.config import TrainingSpec, ZeroSpec
from translution.planner.deepspeed import deepspeed_config
from translution.planner.hardware import MatmulRate, MeasuredRates, Transfer

from ..system.nvme_swap import io_handle

_DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_ROWS = (1, 8, 64, 512, 4096)
_WIDTHS = (64, 192, 384, 768)
_MIN_SECONDS = 0.04
"""Minimum duration of a measurement, which repeats short work."""
_LONG_SECONDS = 0.25
"""Work that takes longer than this is timed once after a warm-up, unless all ranks must call it equally often."""
_SMALL, _LARGE = 2**14, 2**22
"""Numbers of elements that collectives and copies move."""
_ROWS_ELEMENTS, _TILE_ELEMENTS, _GROUP_ELEMENTS = 2**18, 2**21, 2**24
"""Numbers of elements of a relation's rows, of a tile, and of an optimizer's sub-group, which no cache holds."""
_GPU_ELEMENTS = 2**26
"""Numbers of elements of an elementwise operation on a GPU: with 2**18 it takes less time than its call."""
_GPU_MATRIX_BYTES, _GPU_ROW_BYTES = 2**29, 2**30
"""Bytes at most of the matrices, and of the rows and their products, that a GPU multiplies in one call."""
_QUICK_ROWS, _QUICK_WIDTHS, _QUICK_GROUP_ELEMENTS = (1, 64), (64,), 2**18
"""Sizes of a rehearsal of the measurements, whose rates mean little."""
_PIECE_BYTES, _NVME_BYTES, _NVME_SECONDS = 2**26, 2**32, 8.0
"""Bytes that a rank writes to the drive or reads at once, and at most; seconds of each."""
_MODULES = 24
"""Number of modules of the network that measures the engine's overhead."""
_MODULE_WIDTH = 64
"""Rows and columns of the matrix of each module."""


class Stopwatch:
    """Times work that all ranks do at the same time.

    Args:
        device: "cpu" or "cuda".
    """

    def __init__(self, device: str) -> None:
        self.device = device

    def finish(self) -> None:
        """Wait until the device is idle."""
        if self.device == "cuda":
            torch.cuda.synchronize()

    def seconds(self, work: Callable[[], object], *, times: int | None = None) -> float:
        """Median seconds of one call.

        Args:
            work: the function to time.
            times: number of calls per repetition, the same on every rank; None lets each rank choose a number that
                takes long enough.
        """
        # The first call may load kernels or set up a communicator, however short the work itself is.
        self._once(work, 1)
        first = self._once(work, 1)
        if times is None and first > _LONG_SECONDS:
            return first
        count = times or 1
        while times is None:
            elapsed = self._once(work, count)
            if elapsed >= _MIN_SECONDS / 4:
                break
            count = max(2 * count, min(count * 16, int(count * _MIN_SECONDS / 4 / max(elapsed, 1e-7)) + 1))
        return statistics.median(self._once(work, count) / count for _ in range(5))

    def _once(self, work: Callable[[], object], count: int) -> float:
        began = time.perf_counter()
        for _ in range(count):
            work()
        self.finish()
        return time.perf_counter() - began


def measure_matmul(
    stopwatch: Stopwatch, precisions: tuple[Precision, ...], *, quick: bool = False, together: bool | None = None
) -> Iterator[MatmulRate]:
    """Rates of products (rows, width) by (width, width), as the operator computes them for a relation.

    Args:
        stopwatch: times them on its device.
        precisions: of the products.
        quick: a rehearsal with few sizes.
        together: compute many products in one call, as a GPU does, whose calls take longer than one small product;
            None does so on a GPU.
    """
    together = stopwatch.device == "cuda" if together is None else together
    for precision in precisions:
        for width in _QUICK_WIDTHS if quick else _WIDTHS:
            for rows in _QUICK_ROWS if quick else _ROWS:
                count, work = _products(stopwatch.device, precision, rows, width, together=together)
                seconds = stopwatch.seconds(work) / count
                yield MatmulRate(
                    precision=precision, rows=rows, width=width, flops_per_s=2 * rows * width * width / seconds
                )


def _products(
    device: str, precision: Precision, rows: int, width: int, *, together: bool
) -> tuple[int, Callable[[], object]]:
    """Return the number of products of a call, and the call."""
    # Use more matrices than fit a cache, because every relation has its own.
    size = width * width * DTYPE_BYTES[precision]
    if together:
        count = max(2, min(_GPU_MATRIX_BYTES // size, _GPU_ROW_BYTES // (2 * rows * width * DTYPE_BYTES[precision])))
    else:
        count = max(2, 2**25 // size)
    weights = torch.randn(count, width, width, device=device).to(_DTYPES[precision])
    x = torch.randn(count if together else 1, rows, width, device=device).to(_DTYPES[precision])
    out, turn = torch.empty_like(x), [0]

    def one() -> None:
        turn[0] = (turn[0] + 1) % count
        torch.mm(x[0], weights[turn[0]], out=out[0])

    return (count, lambda: torch.bmm(x, weights, out=out)) if together else (1, one)


def measure_elementwise(stopwatch: Stopwatch) -> dict[str, float]:
    """Rates of elementwise operations and norms, and the fixed time of an operation."""
    many, few = (_GPU_ELEMENTS, _GPU_ELEMENTS) if stopwatch.device == "cuda" else (_ROWS_ELEMENTS, _TILE_ELEMENTS)
    rows = torch.ones(many, device=stopwatch.device)
    other, tiny = torch.ones_like(rows), torch.ones(16, device=stopwatch.device)
    tile = rows if few == many else torch.ones(few, device=stopwatch.device)
    return {
        "memory_bytes_per_s": 3 * 4 * many / stopwatch.seconds(lambda: rows.mul_(other)),
        "operation_s": stopwatch.seconds(lambda: tiny.mul_(1.0)),
        "norm_elements_per_s": few / stopwatch.seconds(lambda: tile.double().norm(2)),
    }


def _transfer(stopwatch: Stopwatch, move: Callable[[int], Callable[[], object]], width: int = 4) -> Transfer:
    """Latency and bandwidth of a transfer, from the times of a small and a large one."""
    seconds = [stopwatch.seconds(move(size), times=times) for size, times in ((_SMALL, 20), (_LARGE, 2))]
    rate = width * (_LARGE - _SMALL) / max(seconds[1] - seconds[0], 1e-9)
    return Transfer(latency_s=max(0.0, seconds[0] - width * _SMALL / rate), bytes_per_s=rate)


def measure_collectives(stopwatch: Stopwatch) -> dict[str, Transfer]:
    """Latency and bandwidth of all-gather, reduce-scatter and all-reduce, by bytes of the full tensor."""
    import deepspeed.comm as dist

    world_size = dist.get_world_size()

    def gather(size: int) -> Callable[[], object]:
        full = torch.ones(size, device=stopwatch.device)
        part = torch.ones(size // world_size, device=stopwatch.device)
        return lambda: dist.all_gather_into_tensor(full, part)

    def scatter(size: int) -> Callable[[], object]:
        full = torch.ones(size, device=stopwatch.device)
        part = torch.ones(size // world_size, device=stopwatch.device)
        return lambda: dist.reduce_scatter_tensor(part, full)

    def reduce(size: int) -> Callable[[], object]:
        full = torch.ones(size, device=stopwatch.device)
        return lambda: dist.all_reduce(full)

    moves = {"all_gather": gather, "reduce_scatter": scatter, "all_reduce": reduce}
    return {name: _transfer(stopwatch, move) for name, move in moves.items()}


def measure_copies(stopwatch: Stopwatch) -> dict[str, Transfer]:
    """Latency and bandwidth of copies between pinned host memory and a GPU."""

    def copy(*, to_host: bool) -> Callable[[int], Callable[[], object]]:
        def make(size: int) -> Callable[[], object]:
            host = torch.ones(size).pin_memory()
            device = torch.ones(size, device="cuda")
            return (lambda: host.copy_(device)) if to_host else (lambda: device.copy_(host))

        return make

    return {
        "host_to_device": _transfer(stopwatch, copy(to_host=False)),
        "device_to_host": _transfer(stopwatch, copy(to_host=True)),
    }


def _adam_rate(stopwatch: Stopwatch, device: str, size: int, make: Callable[[list[Tensor]], Any]) -> float:
    parameter = nn.Parameter(torch.ones(size, device=device))
    parameter.grad = torch.ones_like(parameter)
    optimizer = make([parameter])
    return size / stopwatch.seconds(optimizer.step, times=1)


def measure_optimizers(stopwatch: Stopwatch, *, quick: bool = False) -> dict[str, float]:
    """Elements that AdamW updates per second: torch's on the device, fused on a GPU, DeepSpeed's on the host."""
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    size = _QUICK_GROUP_ELEMENTS if quick else _GROUP_ELEMENTS

    def device_adam(parameters: list[Tensor]) -> torch.optim.AdamW:
        # What plans use on the device.
        if stopwatch.device == "cuda":
            return torch.optim.AdamW(parameters, fused=True)
        return torch.optim.AdamW(parameters, foreach=False)

    return {
        "device_adam_elements_per_s": _adam_rate(stopwatch, stopwatch.device, size, device_adam),
        "host_adam_elements_per_s": _adam_rate(stopwatch, "cpu", size, lambda parameters: DeepSpeedCPUAdam(parameters)),
    }


def measure_nvme(device: str, folder: Path, rank: int, world_size: int, *, quick: bool = False) -> dict[str, float]:
    """Bytes per second of all ranks together, with DeepSpeed's I/O library configured as in plans.

    Each rank writes for some seconds, writes the same files again, and reads them: a drive or the system that offers it
    keeps a little data in a cache, and with one small file would be measured too fast.

    Args:
        device: "cpu" or "cuda".
        folder: folder on the drive, in which each rank makes files and removes them.
        rank: this rank.
        world_size: ranks of this machine; together they fill at most a quarter of the free space.
        quick: move little, as a rehearsal.
    """
    handle = io_handle()
    buffer = handle.new_cpu_locked_tensor(_PIECE_BYTES, torch.empty(0, dtype=torch.uint8))
    buffer.random_()  # Some drives do not write zeros.
    files = folder / f"translution-calibrate-{os.getpid()}-{rank}"
    files.mkdir()
    room = shutil.disk_usage(folder).free // (4 * world_size)
    pieces = 1 if quick else max(1, min(_NVME_BYTES, room) // _PIECE_BYTES)
    found = {}
    try:
        # The first writes allocate the files; swap files are written in place.
        for name, move in (("write", handle.sync_pwrite), ("write", handle.sync_pwrite), ("read", handle.sync_pread)):
            rate, pieces = _drive_rate(move, buffer, files, pieces)
            found[f"nvme_{name}_bytes_per_s"] = _sum_of_ranks(rate, device)
    finally:
        handle.free_cpu_locked_tensor(buffer)
        shutil.rmtree(files)
    return found


def _drive_rate(
    move: Callable[[Tensor, str, int], object], buffer: Tensor, folder: Path, pieces: int
) -> tuple[float, int]:
    """Write or read files one after the other until all are done or time is up; return bytes per second and files."""
    began, done = time.perf_counter(), 0
    while done < pieces and time.perf_counter() - began < _NVME_SECONDS:
        move(buffer, str(folder / str(done)), 0)
        done += 1
    return done * _PIECE_BYTES / (time.perf_counter() - began), done


def _sum_of_ranks(value: float, device: str) -> float:
    """Return the sum of all ranks' values."""
    import deepspeed.comm as dist

    total = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return float(total)


class _Chain(nn.Module):
    """A sequence of modules with one matrix each."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(_MODULE_WIDTH, _MODULE_WIDTH, bias=False) for _ in range(_MODULES))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def measure_engine(stopwatch: Stopwatch, world_size: int, found: MeasuredRates) -> dict[str, float]:
    """Seconds that ZeRO-3 adds to a module's forward, a parameter's gradient and a sub-group's step.

    The times of the products, collectives and updates themselves are subtracted.

    Args:
        stopwatch: the stopwatch of the device.
        world_size: number of ranks.
        found: the rates measured before.
    """
    import deepspeed

    numel = _MODULE_WIDTH * _MODULE_WIDTH
    stage: Literal[3] = 3
    zero = ZeroSpec(
        stage=stage,
        reduce_bucket_elements=numel,
        max_live_elements=4 * numel,
        persistence_threshold_elements=0,
        sub_group_elements=-(-numel // world_size),
    )
    config = deepspeed_config(TrainingSpec(micro_batch=1, steps=100), zero, world_size)
    with deepspeed.zero.Init(config_dict_or_path=config):
        network = _Chain()
    engine, *_ = deepspeed.initialize(model=network, model_parameters=network.parameters(), config=config)
    x = torch.ones(1, _MODULE_WIDTH, device=stopwatch.device, requires_grad=True)
    times: dict[str, list[float]] = {"forward": [], "backward": [], "step": []}
    for _ in range(12):
        marks = [time.perf_counter()]
        loss = engine(x).float().mean()
        marks.append(_mark(stopwatch))
        engine.backward(loss)
        marks.append(_mark(stopwatch))
        engine.step()
        marks.append(_mark(stopwatch))
        for name, began, ended in zip(times, marks, marks[1:], strict=False):
            times[name].append(ended - began)
    forward, backward, step = (statistics.median(values[4:]) / _MODULES for values in times.values())
    engine.destroy()
    gather = found.all_gather.seconds(4 * numel) if found.all_gather else 0.0
    scatter = found.reduce_scatter.seconds(4 * numel) if found.reduce_scatter else 0.0
    operation = found.operation_s or 0.0
    update = numel / world_size / (found.device_adam_elements_per_s or float("inf"))
    module = max(0.0, forward - gather - 2 * operation)
    return {
        "module_s": module,
        "gradient_s": max(0.0, backward - module - gather - scatter - 6 * operation),
        "sub_group_s": max(0.0, step - update),
    }


def _mark(stopwatch: Stopwatch) -> float:
    stopwatch.finish()
    return time.perf_counter()


def measure_rates(
    device: str, nvme_path: Path | None, on_line: Callable[[str], None], *, quick: bool = False
) -> MeasuredRates:
    """Measure all rates as one rank.

    Args:
        device: "cpu" or "cuda".
        nvme_path: folder on the NVMe drive to measure; None leaves it out.
        on_line: called with a line of text as each measurement begins.
        quick: measure few and small sizes, as a rehearsal.
    """
    import deepspeed.comm as dist

    rank, world_size = dist.get_rank(), dist.get_world_size()
    stopwatch = Stopwatch(device)
    precisions: tuple[Precision, ...] = ("fp32", "bf16") if device == "cpu" else ("fp32", "bf16", "fp16")
    on_line("matrix products")
    matmul = tuple(measure_matmul(stopwatch, precisions, quick=quick))
    found: dict[str, Any] = {"ranks": world_size, "matmul": matmul}
    on_line("elementwise operations")
    found |= measure_elementwise(stopwatch)
    on_line("collectives")
    dist.barrier()
    found |= measure_collectives(stopwatch)
    if device == "cuda":
        on_line("copies between host and device")
        found |= measure_copies(stopwatch)
    on_line("optimizers")
    dist.barrier()
    found |= measure_optimizers(stopwatch, quick=quick)
    if nvme_path is not None:
        on_line("NVMe")
        dist.barrier()
        found |= measure_nvme(device, nvme_path, rank, world_size, quick=quick)
    on_line("DeepSpeed's engine")
    dist.barrier()
    found |= measure_engine(stopwatch, world_size, MeasuredRates.model_validate(found))
    return MeasuredRates.model_validate(found)
