"""Sizes of the blocks of the fused kernels: a small fixed list for each kernel, from which the fastest is chosen once.

The choice is made at the first call with a device, widths, dtypes and about the same number of rows, on copies of what
the kernel changes; it is kept as long as the process lives.
"""

from __future__ import annotations

import contextlib
import io
import statistics
from collections.abc import Hashable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from translution.planner.common import usable_cores


@dataclass(frozen=True)
class KernelConfig:
    """Sizes of one program of a kernel."""

    rows: int
    """Rows of a relation, a power of two."""
    inner: int
    """Columns of the input width at a time, a power of two."""
    columns: int
    """Columns of whole heads at a time, a power of two."""
    warps: int
    stages: int
    """Loads that are on their way at the same time."""
    registers: int | None = None
    """Limit of the registers of a thread, so that more programs run at a time; None leaves it to the compiler."""

    @property
    def options(self) -> dict[str, int]:
        """Triton's options of a launch. Multiplies and adds are one instruction, whatever Triton's version does."""
        options = {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": True}
        return options if self.registers is None else options | {"maxnreg": self.registers}


class Launch(Protocol):
    """Runs a kernel with a configuration, or only compiles it."""

    def __call__(self, config: KernelConfig, *, only_compile: bool = False) -> None:
        """Run it, or compile it."""


_INTERPRETED = (KernelConfig(64, 32, 64, 4, 1),)
"""For the interpreter, whose time is the number of programs."""
_PROJECTIONS = (
    KernelConfig(128, 64, 128, 8, 3, registers=128),
    KernelConfig(128, 64, 256, 16, 3, registers=128),
    KernelConfig(128, 64, 256, 8, 3),
    KernelConfig(128, 64, 128, 8, 4),
    KernelConfig(64, 64, 128, 4, 3, registers=168),
    KernelConfig(128, 64, 64, 4, 3, registers=168),
)
_GRADIENTS = (
    KernelConfig(64, 128, 128, 8, 3),
    KernelConfig(64, 128, 256, 8, 3),
    KernelConfig(64, 128, 256, 8, 4),
    KernelConfig(64, 128, 128, 8, 4),
    KernelConfig(64, 64, 128, 4, 3),
)
_INPUTS = (
    KernelConfig(128, 128, 64, 8, 3, registers=128),
    KernelConfig(128, 256, 64, 16, 3, registers=128),
    KernelConfig(128, 256, 64, 8, 3),
    KernelConfig(256, 128, 64, 8, 3),
    KernelConfig(64, 128, 64, 4, 3, registers=168),
    KernelConfig(128, 64, 64, 4, 3, registers=168),
)
CANDIDATES: dict[str, tuple[KernelConfig, ...]] = {
    "logits_kernel": _PROJECTIONS,
    "projected_gradients_kernel": _PROJECTIONS,
    "values_kernel": _PROJECTIONS,
    "matrix_gradients_kernel": _GRADIENTS,
    "input_gradients_kernel": _INPUTS,
    "plain_gradients_kernel": (KernelConfig(32, 64, 64, 4, 1),),
}
"""Configurations of each kernel; the first is taken where none is timed."""
_EXACT = {
    "matrix_gradients_kernel": KernelConfig(16, 64, 64, 4, 2),
    "input_gradients_kernel": KernelConfig(64, 32, 64, 4, 2),
    "plain_gradients_kernel": KernelConfig(32, 64, 64, 4, 1),
}
"""Products of fp32 without TF32 do not use tensor cores: Triton unrolls them, and larger blocks compile for minutes."""
_EXACT_PROJECTION = KernelConfig(64, 16, 64, 4, 2)
_chosen: dict[Hashable, KernelConfig] = {}
_timed: list[tuple[Hashable, KernelConfig, float]] = []


def tuning_record() -> tuple[tuple[Hashable, KernelConfig, float], ...]:
    """Return every configuration that this process has timed: what the choice depends on, it, and its seconds.

    The seconds are infinite where the device lacks the resources.
    """
    return tuple(_timed)


def candidates(kernel: str, dtype: torch.dtype, precision: str) -> tuple[KernelConfig, ...]:
    """Return the configurations of a kernel.

    Args:
        kernel: name of the kernel.
        dtype: dtype of the rows.
        precision: of the products, "ieee", "tf32" or, in Triton's interpreter, "upcast".
    """
    if precision == "upcast":
        return _INTERPRETED
    if dtype == torch.float32 and precision == "ieee":
        return (_EXACT.get(kernel, _EXACT_PROJECTION),)
    return CANDIDATES[kernel]


def heads_and_columns(heads: int, head_dim: int, columns: int) -> tuple[int, int]:
    """Return the number of heads of a program and the columns of each, both powers of two, together at least 16.

    Args:
        heads: number of heads of the layer.
        head_dim: width of a head.
        columns: number of columns wanted.
    """
    width = 1 << (head_dim - 1).bit_length()
    together = min(columns // width, 1 << (heads - 1).bit_length())
    return max(together, 1, 16 // width), width


def fitted(config: KernelConfig, element_bytes: int, width: int) -> KernelConfig:
    """Return the configuration with smaller blocks for wide heads, and fewer loads at a time for wide elements.

    Registers hold two accumulators, and shared memory holds the loads that are on their way.

    Args:
        config: sizes for elements of two bytes and heads of up to ``config.columns`` columns.
        element_bytes: size of an element of the rows.
        width: columns of a head in a program.
    """
    wide = max(1, width // config.columns)
    rows, inner = max(16, config.rows // wide), max(16, config.inner // wide)
    if element_bytes > 2:
        return replace(config, rows=rows, inner=max(16, inner // 2), stages=min(config.stages, 2))
    return replace(config, rows=rows, inner=inner)


def choose_config(key: Hashable, offered: tuple[KernelConfig, ...], launch: Launch, *, timed: bool) -> KernelConfig:
    """Return the fastest configuration, or the first that the device has the resources for, found at the first call.

    Args:
        key: what the choice depends on.
        offered: the configurations.
        launch: runs or compiles the kernel with a configuration, on memory that may be overwritten.
        timed: whether to look for the fastest; a choice by time may differ from run to run.

    Raises:
        RuntimeError: if no configuration works.
    """
    if len(offered) == 1:
        return offered[0]
    if (key, timed) in _chosen:
        return _chosen[key, timed]
    if torch.cuda.is_current_stream_capturing():
        return offered[0]
    best, least = offered[0], float("inf")
    if timed:
        _compile_together(offered, launch)
    for config in offered:
        seconds = _seconds(launch, config)
        _timed.append((key, config, seconds))
        if seconds < least:
            best, least = config, seconds
            if not timed:
                break
    if least == float("inf"):
        launch(best)  # Raises the error.
    _chosen[key, timed] = best
    return best


def _compile_together(offered: tuple[KernelConfig, ...], launch: Launch) -> None:
    """Compile the configurations at the same time; one that does not compile fails again when it is launched."""
    import triton

    with (
        contextlib.redirect_stdout(io.StringIO()),  # Triton prints the assembly that needs too many registers.
        ThreadPoolExecutor(max(1, min(len(offered), usable_cores()))) as executor,
        triton.AsyncCompileMode(executor, ignore_errors=True),
    ):
        for config in offered:
            launch(config, only_compile=True)


def _seconds(launch: Launch, config: KernelConfig, repeats: int = 3) -> float:
    """Median time of a launch, infinite if the device lacks the resources."""
    from triton.runtime.errors import OutOfResources, PTXASError

    try:
        with contextlib.redirect_stdout(io.StringIO()):
            launch(config)
    except (OutOfResources, PTXASError):
        return float("inf")
    times: list[float] = []
    torch.cuda.synchronize()  # Work on other streams would slow it down.
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        launch(config)
        end.record()
        end.synchronize()
        times.append(float(begin.elapsed_time(end)) / 1000)
    return statistics.median(times)
