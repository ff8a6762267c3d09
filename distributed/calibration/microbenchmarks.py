"""What each rank measures of its machine: products, memory, collectives, copies, optimizers, NVMe, the engine.

All ranks do the same at the same time, as they do in a run.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from translution.planner.config.training import DTYPE_BYTES, Precision, TrainingSpec
from translution.planner.config.zero import ZeroSpec
from translution.planner.deepspeed.config import deepspeed_config
from translution.planner.hardware.calibrated_rates import MatmulRate, MeasuredRates, Transfer

from ..system.nvme_swap import io_handle

DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
ROWS = (1, 8, 64, 512, 4096)
WIDTHS = (64, 192, 384, 768)
SECONDS = 0.04
"""How long one thing is repeated, at least."""
LONG = 0.25
"""What takes so long once is timed once more, and no oftener."""
SMALL, LARGE = 2**14, 2**22
"""Elements of the tensors that collectives and copies move."""
ROWS_ELEMENTS, TILE_ELEMENTS, GROUP_ELEMENTS = 2**18, 2**21, 2**24
"""Of a relation's rows, of a tile, and of an optimizer's sub-group, which no cache holds."""
MODULES = 24
"""Of the network that the engine's own time is measured with."""
MODULE_WIDTH = 64

Say = Callable[[str], None]


class Stopwatch:
    """Times what all ranks do at once.

    Args:
        device: "cpu" or "cuda".
    """

    def __init__(self, device: str) -> None:
        self.device = device

    def finish(self) -> None:
        """Wait for what the device still does."""
        if self.device == "cuda":
            torch.cuda.synchronize()

    def seconds(self, work: Callable[[], object], *, times: int | None = None) -> float:
        """Median seconds of one call, in which every rank makes as many.

        Args:
            work: what is timed.
            times: calls per repetition; None finds how many take long enough, each rank for itself.
        """
        first = self._once(work, 1)
        if first > LONG:
            return self._once(work, 1)
        count = times or 1
        while times is None:
            elapsed = self._once(work, count)
            if elapsed >= SECONDS / 4:
                break
            count = max(2 * count, min(count * 16, int(count * SECONDS / 4 / max(elapsed, 1e-7)) + 1))
        return statistics.median(self._once(work, count) / count for _ in range(5))

    def _once(self, work: Callable[[], object], count: int) -> float:
        began = time.perf_counter()
        for _ in range(count):
            work()
        self.finish()
        return time.perf_counter() - began


def measure_matmul(watch: Stopwatch, precisions: tuple[Precision, ...]) -> Iterator[MatmulRate]:
    """Products (rows, width) by (width, width), as the operator makes them for a relation."""
    for precision in precisions:
        for width in WIDTHS:
            # As many matrices as do not fit a cache: every relation has its own.
            count = max(2, 2**25 // (width * width * DTYPE_BYTES[precision]))
            weights = torch.randn(count, width, width, device=watch.device).to(DTYPES[precision])
            for rows in ROWS:
                x = torch.randn(rows, width, device=watch.device).to(DTYPES[precision])
                out, turn = torch.empty_like(x), [0]

                def work(x: Tensor = x, out: Tensor = out, turn: list[int] = turn, weights: Tensor = weights) -> None:
                    turn[0] = (turn[0] + 1) % len(weights)
                    torch.mm(x, weights[turn[0]], out=out)

                seconds = watch.seconds(work)
                yield MatmulRate(
                    precision=precision, rows=rows, width=width, flops_per_s=2 * rows * width * width / seconds
                )


def measure_elementwise(watch: Stopwatch) -> dict[str, float]:
    """What elementwise operations read and write, on tensors of different sizes."""
    rows = torch.ones(ROWS_ELEMENTS, device=watch.device)
    other, tiny = torch.ones_like(rows), torch.ones(16, device=watch.device)
    tile = torch.ones(TILE_ELEMENTS, device=watch.device)
    return {
        "memory_bytes_per_s": 3 * 4 * ROWS_ELEMENTS / watch.seconds(lambda: rows.mul_(other)),
        "operation_s": watch.seconds(lambda: tiny.mul_(1.0)),
        "norm_elements_per_s": TILE_ELEMENTS / watch.seconds(lambda: tile.double().norm(2)),
    }


def _transfer(watch: Stopwatch, move: Callable[[int], Callable[[], object]], width: int = 4) -> Transfer:
    """Latency and rate of what moves so many elements, from a small and a large one."""
    seconds = [watch.seconds(move(size), times=times) for size, times in ((SMALL, 20), (LARGE, 2))]
    rate = width * (LARGE - SMALL) / max(seconds[1] - seconds[0], 1e-9)
    return Transfer(latency_s=max(0.0, seconds[0] - width * SMALL / rate), bytes_per_s=rate)


def measure_collectives(watch: Stopwatch) -> dict[str, Transfer]:
    """All-gather, reduce-scatter and all-reduce between the ranks, by bytes of the whole tensor."""
    import deepspeed.comm as dist

    ranks = dist.get_world_size()

    def gather(size: int) -> Callable[[], object]:
        whole = torch.ones(size, device=watch.device)
        part = torch.ones(size // ranks, device=watch.device)
        return lambda: dist.all_gather_into_tensor(whole, part)

    def scatter(size: int) -> Callable[[], object]:
        whole = torch.ones(size, device=watch.device)
        part = torch.ones(size // ranks, device=watch.device)
        return lambda: dist.reduce_scatter_tensor(part, whole)

    def reduce(size: int) -> Callable[[], object]:
        whole = torch.ones(size, device=watch.device)
        return lambda: dist.all_reduce(whole)

    moves = {"all_gather": gather, "reduce_scatter": scatter, "all_reduce": reduce}
    return {name: _transfer(watch, move) for name, move in moves.items()}


def measure_copies(watch: Stopwatch) -> dict[str, Transfer]:
    """Copies between pinned host memory and a GPU."""

    def copy(*, down: bool) -> Callable[[int], Callable[[], object]]:
        def make(size: int) -> Callable[[], object]:
            host = torch.ones(size).pin_memory()
            device = torch.ones(size, device="cuda")
            return (lambda: host.copy_(device)) if down else (lambda: device.copy_(host))

        return make

    return {
        "host_to_device": _transfer(watch, copy(down=False)),
        "device_to_host": _transfer(watch, copy(down=True)),
    }


def _adam_rate(watch: Stopwatch, device: str, make: Callable[[list[Tensor]], Any]) -> float:
    parameter = nn.Parameter(torch.ones(GROUP_ELEMENTS, device=device))
    parameter.grad = torch.ones_like(parameter)
    optimizer = make([parameter])
    return GROUP_ELEMENTS / watch.seconds(optimizer.step, times=1)


def measure_optimizers(watch: Stopwatch) -> dict[str, float]:
    """Elements that AdamW updates per second: torch's on the device, DeepSpeed's on the host."""
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    return {
        "device_adam_elements_per_s": _adam_rate(
            watch, watch.device, lambda parameters: torch.optim.AdamW(parameters, foreach=False)
        ),
        "host_adam_elements_per_s": _adam_rate(watch, "cpu", lambda parameters: DeepSpeedCPUAdam(parameters)),
    }


def measure_nvme(watch: Stopwatch, folder: Path, rank: int, ranks: int) -> dict[str, float]:
    """Bytes per second of all ranks together, through DeepSpeed's I/O library as plans set it."""
    size = 2**26
    handle = io_handle()
    buffer = handle.new_cpu_locked_tensor(size, torch.empty(0, dtype=torch.uint8))
    path = str(folder / f"translution-calibrate-{os.getpid()}-{rank}.bin")
    try:
        write = watch.seconds(lambda: handle.sync_pwrite(buffer, path, 0), times=1)
        read = watch.seconds(lambda: handle.sync_pread(buffer, path, 0), times=1)
    finally:
        handle.free_cpu_locked_tensor(buffer)
        Path(path).unlink(missing_ok=True)
    return {"nvme_write_bytes_per_s": ranks * size / write, "nvme_read_bytes_per_s": ranks * size / read}


class _Chain(nn.Module):
    """Modules one after another, each of one matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(MODULE_WIDTH, MODULE_WIDTH, bias=False) for _ in range(MODULES))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def measure_engine(watch: Stopwatch, ranks: int, found: MeasuredRates) -> dict[str, float]:
    """ZeRO-3's own seconds for a module's use, a parameter's gradient and a sub-group's step.

    What the products, collectives and updates of the same network take by themselves is left out.

    Args:
        watch: the device's.
        ranks: of the world.
        found: what was measured before.
    """
    import deepspeed

    numel = MODULE_WIDTH * MODULE_WIDTH
    stage: Literal[3] = 3
    zero = ZeroSpec(
        stage=stage,
        reduce_bucket_elements=numel,
        max_live_elements=4 * numel,
        persistence_threshold_elements=0,
        sub_group_elements=-(-numel // ranks),
    )
    config = deepspeed_config(TrainingSpec(micro_batch=1, steps=100), zero, ranks)
    with deepspeed.zero.Init(config_dict_or_path=config):
        network = _Chain()
    engine, *_ = deepspeed.initialize(model=network, model_parameters=network.parameters(), config=config)
    x = torch.ones(1, MODULE_WIDTH, device=watch.device, requires_grad=True)
    times: dict[str, list[float]] = {"forward": [], "backward": [], "step": []}
    for _ in range(12):
        marks = [time.perf_counter()]
        loss = engine(x).float().mean()
        marks.append(_mark(watch))
        engine.backward(loss)
        marks.append(_mark(watch))
        engine.step()
        marks.append(_mark(watch))
        for name, began, ended in zip(times, marks, marks[1:], strict=False):
            times[name].append(ended - began)
    forward, backward, step = (statistics.median(values[4:]) / MODULES for values in times.values())
    engine.destroy()
    gather = found.all_gather.seconds(4 * numel) if found.all_gather else 0.0
    scatter = found.reduce_scatter.seconds(4 * numel) if found.reduce_scatter else 0.0
    operation = found.operation_s or 0.0
    update = numel / ranks / (found.device_adam_elements_per_s or float("inf"))
    module = max(0.0, forward - gather - 2 * operation)
    return {
        "module_s": module,
        "gradient_s": max(0.0, backward - module - gather - scatter - 6 * operation),
        "sub_group_s": max(0.0, step - update),
    }


def _mark(watch: Stopwatch) -> float:
    watch.finish()
    return time.perf_counter()


def calibrate_rank(device: str, nvme_path: Path | None, say: Say) -> MeasuredRates:
    """Measure everything that this rank can.

    Args:
        device: "cpu" or "cuda".
        nvme_path: a folder on the drive to measure; None leaves it out.
        say: called with a line as each part begins.
    """
    import deepspeed.comm as dist

    rank, ranks = dist.get_rank(), dist.get_world_size()
    watch = Stopwatch(device)
    precisions: tuple[Precision, ...] = ("fp32", "bf16") if device == "cpu" else ("fp32", "bf16", "fp16")
    say("matrix products")
    found: dict[str, Any] = {"ranks": ranks, "matmul": tuple(measure_matmul(watch, precisions))}
    say("elementwise operations")
    found |= measure_elementwise(watch)
    say("collectives")
    dist.barrier()
    found |= measure_collectives(watch)
    if device == "cuda":
        say("copies between host and device")
        found |= measure_copies(watch)
    say("optimizers")
    dist.barrier()
    found |= measure_optimizers(watch)
    if nvme_path is not None:
        say("NVMe")
        dist.barrier()
        found |= measure_nvme(watch, nvme_path, rank, ranks)
    say("DeepSpeed's engine")
    dist.barrier()
    found |= measure_engine(watch, ranks, MeasuredRates.model_validate(found))
    return MeasuredRates.model_validate(found)
