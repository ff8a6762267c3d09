"""What a rank really holds: live tensors between steps, and the peak of allocations in a step."""

from __future__ import annotations

import contextlib
import ctypes
import resource
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


class StorageCounter:
    """Adds up the bytes of tensors' storages, each storage once over the counter's life."""

    def __init__(self) -> None:
        self._seen: set[int] = set()

    def add(self, tensors: Iterable[object]) -> int:
        """Bytes of the storages not counted before."""
        total = 0
        for tensor in tensors:
            if not isinstance(tensor, Tensor) or tensor.device.type == "meta":
                continue
            try:
                storage = tensor.untyped_storage()
                pointer, size = storage.data_ptr(), storage.nbytes()
            except (NotImplementedError, RuntimeError):
                continue  # A tensor without a plain storage (sparse, wrapped) holds no bytes of its own.
            if pointer and pointer not in self._seen:
                self._seen.add(pointer)
                total += size
        return total


def process_peak_bytes() -> int:
    """Highest resident set of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def count_every_allocation() -> None:
    """Make torch's CPU allocator count from now on, whichever thread allocates and frees.

    A profiler sees only the thread that opened it, but gloo frees gathered buffers in its own. The
    allocator's own count has a switch in C++ alone, a global of libc10; without it the figures of
    `trace_allocations` err high by what other threads free. Call it before the first tensor.
    """
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    with contextlib.suppress(ValueError):
        ctypes.c_bool.in_dll(library, "FLAGS_caffe2_report_cpu_memory_usage").value = True


def trace_allocations(phase: Callable[[], None]) -> tuple[int, int]:
    """Call a function and watch torch's CPU allocator.

    Returns:
        Bytes that were allocated when it began, and the most that were at any moment of it.
    """
    from torch._C._profiler import _EventType

    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True, acc_events=True) as profile:
        first = torch.empty(1, dtype=torch.uint8)
        phase()
    assert profile.profiler is not None and profile.profiler.kineto_results is not None
    totals = []
    pending: list[Any] = list(profile.profiler.kineto_results.experimental_event_tree())
    while pending:
        event = pending.pop()
        pending.extend(event.children)
        if event.tag == _EventType.Allocation and event.extra_fields.device == torch.device("cpu"):
            totals.append((event.start_time_ns, event.extra_fields.total_allocated))
    begin = min(totals)[1] - first.nbytes
    return begin, max(total for _, total in totals)


def zero_entries(engine: Any) -> dict[str, list[object]]:
    """The long-lived tensors of a ZeRO engine, told apart.

    Attribute names are those of DeepSpeed 0.19.8's DeepSpeedZeroOptimizer_Stage3 and of the
    stage 1 and 2 optimizer; an attribute that a stage does not have gives nothing.
    """
    parameters = list(engine.module.parameters())
    optimizer = engine.optimizer
    inner = getattr(optimizer, "optimizer", optimizer)
    states = [value for state in inner.state.values() for value in state.values()]

    def attribute(name: str) -> list[object]:
        return flatten(getattr(optimizer, name, None))

    def flatten(value: object) -> list[object]:
        if isinstance(value, dict):
            value = list(value.values())
        if isinstance(value, list | tuple):
            return [tensor for entry in value for tensor in flatten(entry)]
        return [value]

    buckets = getattr(optimizer, "ipg_buckets", {})
    return {
        "parameters": [getattr(p, "ds_tensor", p) for p in parameters]
        + attribute("fp16_partitioned_groups_flat")
        + attribute("fp16_groups_flat"),
        "persistent parameters": list(parameters),
        "gradients": attribute("grad_partitions_flat_buffer") + [p.grad for p in parameters],
        "master parameters": attribute("fp32_partitioned_groups_flat")
        + attribute("single_partition_of_fp32_groups")
        + attribute("fp32_groups_flat")
        + attribute("fp32_groups"),
        "optimizer states": states,
        "reduce bucket": [getattr(bucket, "buffer", None) for bucket in buckets.values()],
    }
