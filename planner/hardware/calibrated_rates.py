"""What `translution calibrate` measured of a machine: a section of a cluster file."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, TypeAlias

from pydantic import Field

from ..common.schema import Schema
from ..config.training import Precision

Rate: TypeAlias = Annotated[float, Field(gt=0)]
Seconds: TypeAlias = Annotated[float, Field(ge=0)]


class Transfer(Schema):
    """Moving bytes: so long for any number of them, and so many more each second."""

    latency_s: Seconds
    bytes_per_s: Rate

    def seconds(self, size: float) -> float:
        """Time for so many bytes."""
        return self.latency_s + size / self.bytes_per_s


class MatmulRate(Schema):
    """A product of (rows, width) by (width, width), as fast as this machine did it."""

    precision: Precision
    rows: Annotated[int, Field(gt=0)]
    width: Annotated[int, Field(gt=0)]
    flops_per_s: Rate


class MeasuredRates(Schema):
    """Rates of one machine, each None where it was not measured."""

    command: str = ""
    time_utc: str = ""
    machine: str = ""
    """Processor, cores, versions."""
    ranks: Annotated[int, Field(gt=0)] = 1
    """Ranks that worked at once while compute and collectives were measured."""
    matmul: tuple[MatmulRate, ...] = ()
    memory_bytes_per_s: Rate | None = None
    """Bytes read and written by elementwise operations on tensors of a megabyte, as a relation's are."""
    norm_elements_per_s: Rate | None = None
    """Elements of a tile's gradient squared in fp64, as DeepSpeed takes its norm."""
    operation_s: Seconds | None = None
    """One small tensor operation, called from Python."""
    all_gather: Transfer | None = None
    """Of bytes that each rank receives from others; likewise the other two."""
    reduce_scatter: Transfer | None = None
    all_reduce: Transfer | None = None
    host_to_device: Transfer | None = None
    device_to_host: Transfer | None = None
    host_adam_elements_per_s: Rate | None = None
    """DeepSpeed's AdamW for the CPU, of one rank while all ranks run it."""
    device_adam_elements_per_s: Rate | None = None
    """torch's AdamW."""
    nvme_read_bytes_per_s: Rate | None = None
    nvme_write_bytes_per_s: Rate | None = None
    """Of all ranks of a node together, through DeepSpeed's I/O library."""
    module_s: Seconds | None = None
    """ZeRO-3's hooks around one module, forward and backward, beside the collectives."""
    gradient_s: Seconds | None = None
    """What the engine does with one parameter's gradient, beside the collectives."""
    sub_group_s: Seconds | None = None
    """ZeRO-3's step of one sub-group, beside the update itself."""


def interpolate(points: Sequence[MatmulRate], rows: float, width: float) -> float:
    """FLOP/s of a product of (rows, width) by (width, width) between measured points.

    Linear in the logarithms, along rows at the two measured widths around the asked one; flat outside.

    Args:
        points: all of one precision; at least one.
        rows: of the left matrix.
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
    share = min(1.0, max(0.0, (x - x0) / (x1 - x0)))
    return y0 + share * (y1 - y0)
