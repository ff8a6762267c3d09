"""Traces torch's CPU allocator, and counts the bytes of live tensors and of tensors saved for backward."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._C._autograd import _disable_profiler, _enable_profiler, _prepare_profiler
from torch._C._profiler import RecordScope, _EventType


class StorageCounter:
    """Adds up the bytes of tensors' storages; counts each storage once."""

    def __init__(self) -> None:
        self._seen: set[int] = set()

    def add(self, tensors: Iterable[object]) -> int:
        """Return the bytes of the tensors' storages that were not counted before."""
        total = 0
        for tensor in tensors:
            if not isinstance(tensor, Tensor) or tensor.device.type == "meta":
                continue
            try:
                storage = tensor.untyped_storage()
                pointer, size = storage.data_ptr(), storage.nbytes()
            except (NotImplementedError, RuntimeError):
                continue  # Sparse and wrapped tensors have no plain storage, and no bytes of their own.
            if pointer and pointer not in self._seen:
                self._seen.add(pointer)
                total += size
        return total


def count_every_allocation() -> None:
    """Make torch's CPU allocator count the allocations of all threads from now on; call it before the first tensor.

    A profiler only sees the thread that started it, but gloo frees gathered buffers in its own thread. The allocator's
    own counter can only be switched on through a C++ global of libc10. Without it, `trace_allocations` overestimates
    by the bytes that other threads free.
    """
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    with contextlib.suppress(ValueError):
        ctypes.c_bool.in_dll(library, "FLAGS_caffe2_report_cpu_memory_usage").value = True


def load_libraries() -> None:
    """Load the parts of torch and DeepSpeed that load on first use, so that a run's measurement excludes them."""
    import deepspeed.runtime.zero.stage3
    import deepspeed.runtime.zero.stage_1_and_2  # noqa: F401  # imported for the effect of loading
    import torch._dynamo  # otherwise the first block that is recomputed does

    for dtype in (torch.float32, torch.bfloat16):
        parts = torch.nn.Linear(64, 64), torch.nn.GELU(), torch.nn.LayerNorm(64)
        layer = torch.nn.Sequential(*parts).to(dtype)
        optimizer = torch.optim.AdamW(layer.parameters(), foreach=False)
        layer(torch.randn(64, 64, dtype=dtype)).float().logsumexp(-1).sum().backward()
        optimizer.step()


def trace_allocations(phase: Callable[[], None]) -> tuple[int, int]:
    """Call a function and trace torch's CPU allocator.

    Returns:
        Bytes allocated at the start, and the peak of allocated bytes during the call.
    """
    config = torch.autograd.profiler.profile(profile_memory=True).config()
    activities = {torch.profiler.ProfilerActivity.CPU}
    _prepare_profiler(config, activities)
    # Record only allocations: a step has millions of operations, and none of them is in this scope.
    _enable_profiler(config, activities, {RecordScope.LITE_INTERPRETER})  # type: ignore[call-arg]  # its stub lacks it
    try:
        first = torch.empty(1, dtype=torch.uint8)
        phase()
    finally:
        results = _disable_profiler()
    totals = []
    pending: list[Any] = list(results.experimental_event_tree())
    while pending:
        event = pending.pop()
        pending.extend(event.children)
        if event.tag == _EventType.Allocation and event.extra_fields.device == torch.device("cpu"):
            totals.append((event.start_time_ns, event.extra_fields.total_allocated))
    begin = min(totals)[1] - first.nbytes
    return begin, max(total for _, total in totals)


class SavedTensorCounter:
    """Adds up the bytes that autograd saves for backward: unique storages, without parameters and buffers.

    Args:
        module: the network whose parameters and buffers are not counted.
    """

    def __init__(self, module: torch.nn.Module) -> None:
        self._buffers = {tensor.untyped_storage().data_ptr() for tensor in module.buffers()}
        self._saved: dict[int, int] = {}

    @property
    def total_bytes(self) -> int:
        """Bytes saved by everything that ran under `counting`."""
        return sum(self._saved.values())

    @contextlib.contextmanager
    def counting(self) -> Iterator[None]:
        """Count what a forward pass within the block saves."""
        with torch.autograd.graph.saved_tensors_hooks(self._add, lambda tensor: tensor):
            yield

    def _add(self, tensor: Tensor) -> Tensor:
        # Under ZeRO-3 a gathered parameter has a temporary storage, so parameters are recognized by their class.
        parameter = isinstance(tensor, torch.nn.Parameter) or isinstance(tensor._base, torch.nn.Parameter)
        storage = tensor.untyped_storage()
        if not parameter and storage.data_ptr() not in self._buffers:
            self._saved[storage.data_ptr()] = storage.nbytes()
        return tensor
