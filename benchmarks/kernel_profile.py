"""Time of each kernel of a call on a GPU, as torch's profiler reports it, and of the configurations tried."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from translution.models.ops.fused import tuning_record

_NAME_LENGTH = 80
"""Names of compiled templates are long."""


def kernel_rows(run: Callable[[], None], most: int = 12) -> list[dict[str, Any]]:
    """Return name, calls and seconds of the kernels of one call that take most of its time, the longest first.

    Args:
        run: function to profile; it has run before, so that nothing is compiled or tuned.
        most: number of kernels.
    """
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        run()
        torch.cuda.synchronize()
    found: dict[str, list[float]] = {}
    for event in recorded.events() or ():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            found.setdefault(event.name[:_NAME_LENGTH], []).append(event.device_time / 1e6)
    rows = [{"kernel": name, "calls": len(times), "seconds": sum(times)} for name, times in found.items()]
    return sorted(rows, key=lambda row: -row["seconds"])[:most]


def tuning_rows() -> list[dict[str, Any]]:
    """Return the configurations of the fused kernels that this process has timed, with their seconds.

    The seconds are None where the card lacks the resources.
    """
    rows = []
    for key, config, seconds in tuning_record():
        kernel, constants, *_, widths, size = key if isinstance(key, tuple) else (key, (), (), 0)
        row = {"kernel": kernel, "constants": " ".join(f"{name}={value}" for name, value in constants)}
        row |= {"widths": list(widths), "size_class": size, **dataclasses.asdict(config)}
        rows.append(row | {"seconds": None if math.isinf(seconds) else seconds})
    return rows
