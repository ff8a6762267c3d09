"""Rates of a machine that `translution calibrate` measured: the section ``measured`` of a cluster file."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, TypeAlias

from pydantic import Field

from ..common.schema import Schema
from ..common.types import Precision

Rate: TypeAlias = Annotated[float, Field(gt=0)]
"""Units per second."""
Seconds: TypeAlias = Annotated[float, Field(ge=0)]


class Transfer(Schema):
    """Linear transfer model: fixed latency plus bytes / bandwidth."""

    latency_s: Seconds
    bytes_per_s: Rate

    def seconds(self, size: float) -> float:
        """Return the time to transfer ``size`` bytes."""
        return self.latency_s + size / self.bytes_per_s


class MatmulRate(Schema):
    """Measured speed of a product (rows, width) by (width, width)."""

    precision: Precision
    rows: Annotated[int, Field(gt=0)]
    width: Annotated[int, Field(gt=0)]
    flops_per_s: Rate


class MeasuredRates(Schema):
    """Measured rates of one machine; None if a rate was not measured."""

    command: str = ""
    """Command that measured the rates."""
    time_utc: str = ""
    machine: str = ""
    """Processor, number of cores, versions."""
    ranks: Annotated[int, Field(gt=0)] = 1
    """Number of ranks that ran at the same time while compute and collectives were measured."""
    matmul: tuple[MatmulRate, ...] = ()
    memory_bytes_per_s: Rate | None = None
    """Bytes per second that elementwise operations read and write, on tensors of 1 MB, the size of a relation's."""
    norm_elements_per_s: Rate | None = None
    """Elements per second of a gradient norm in fp64, as DeepSpeed computes it."""
    operation_s: Seconds | None = None
    """Seconds of one small tensor operation called from Python."""
    all_gather: Transfer | None = None
    """All-gather, by the bytes of the full tensor."""
    reduce_scatter: Transfer | None = None
    """Reduce-scatter, by the bytes of the full tensor."""
    all_reduce: Transfer | None = None
    """All-reduce, by the bytes of the full tensor."""
    host_to_device: Transfer | None = None
    """Copy from the host to one device."""
    device_to_host: Transfer | None = None
    """Copy from one device to the host."""
    host_adam_elements_per_s: Rate | None = None
    """Elements per second that DeepSpeed's CPU AdamW updates on one rank while all ranks run it."""
    device_adam_elements_per_s: Rate | None = None
    """Elements per second that torch's AdamW updates."""
    nvme_read_bytes_per_s: Rate | None = None
    """NVMe read rate of all ranks of a node together, through DeepSpeed's I/O library."""
    nvme_write_bytes_per_s: Rate | None = None
    """NVMe write rate of all ranks of a node together, through DeepSpeed's I/O library."""
    module_s: Seconds | None = None
    """Seconds of ZeRO-3's hooks around one module, forward and backward, without the collectives."""
    gradient_s: Seconds | None = None
    """Seconds of the engine's work on one parameter's gradient, without the collectives."""
    sub_group_s: Seconds | None = None
    """Seconds of ZeRO-3's step of one sub-group, without the update itself."""


def interpolate(points: Sequence[MatmulRate], rows: float, width: float) -> float:
    """Interpolate the FLOP/s of a product (rows, width) by (width, width) between measured points.

    Interpolation is linear in the logarithms: along rows at the two nearest measured widths, then between the widths.
    Outside of the measured range the nearest value holds.

    Args:
        points: measured products of one precision; at least one.
        rows: rows of the left matrix.
        width: geometric mean of the right matrix's sides.
    """
    widths = sorted({point.width for point in points})
    low = max((w for w in widths if w <= width), default=widths[0])
    high = min((w for w in widths if w >= width), default=widths[-1])
    ends = []
    for each in (low, high):
        column = sorted((point.rows, point.flops_per_s) for point in points if point.width == each)
        ends.append(_along(column, rows))
    return math.exp(_between(math.log(low), math.log(high), math.log(ends[0]), math.log(ends[1]), math.log(width)))


def _along(column: Sequence[tuple[int, float]], rows: float) -> float:
    before = max((pair for pair in column if pair[0] <= rows), default=column[0])
    after = min((pair for pair in column if pair[0] >= rows), default=column[-1])
    logs = [math.log(value) for value in (before[0], after[0], before[1], after[1], rows)]
    return math.exp(_between(*logs))


def _between(x0: float, x1: float, y0: float, y1: float, x: float) -> float:
    if x1 <= x0:
        return y0
    fraction = min(1.0, max(0.0, (x - x0) / (x1 - x0)))
    return y0 + fraction * (y1 - y0)
