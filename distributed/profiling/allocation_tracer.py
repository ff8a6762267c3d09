"""What a rank really holds: live tensors between steps, and the peak of allocations in a step."""

from __future__ import annotations

import contextlib
import ctypes
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._C._autograd import _disable_profiler, _enable_profiler, _prepare_profiler
from torch._C._profiler import RecordScope, _EventType

_SETTLE_SECONDS = 0.002


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


def count_every_allocation() -> None:
    """Make torch's CPU allocator count from now on, whichever thread allocates and frees.

    A profiler sees only the thread that opened it, but gloo frees gathered buffers in its own. The
    allocator's own count has a switch in C++ alone, a global of libc10; without it the figures of
    `trace_allocations` err high by what other threads free. Call it before the first tensor.
    """
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    with contextlib.suppress(ValueError):
        ctypes.c_bool.in_dll(library, "FLAGS_caffe2_report_cpu_memory_usage").value = True


def load_libraries() -> None:
    """Let the parts of torch and DeepSpeed that load themselves when first used be loaded now.

    What a process holds from here on is the run's.
    """
    import deepspeed.runtime.zero.stage3
    import deepspeed.runtime.zero.stage_1_and_2  # noqa: F401  # loading is what is wanted

    for dtype in (torch.float32, torch.bfloat16):
        parts = torch.nn.Linear(64, 64), torch.nn.GELU(), torch.nn.LayerNorm(64)
        layer = torch.nn.Sequential(*parts).to(dtype)
        optimizer = torch.optim.AdamW(layer.parameters(), foreach=False)
        layer(torch.randn(64, 64, dtype=dtype)).float().logsumexp(-1).sum().backward()
        optimizer.step()


def trace_allocations(phase: Callable[[], None]) -> tuple[int, int]:
    """Call a function and watch torch's CPU allocator.

    Returns:
        Bytes that were allocated when it began, and the most that were at any moment of it.
    """
    config = torch.autograd.profiler.profile(profile_memory=True).config()
    activities = {torch.profiler.ProfilerActivity.CPU}
    _prepare_profiler(config, activities)
    # Of all that the profiler can record, only allocations: a step has millions of operations, and
    # this scope has none.
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


@contextlib.contextmanager
def settled_collectives() -> Iterator[None]:
    """Let gloo's thread let go of what it gathered or reduced before a rank goes on.

    It does so some time later otherwise, now before and now after the next tensors are made, so
    that no two runs have the same peak. DeepSpeed's releases and reductions wait two milliseconds here.
    """
    from deepspeed.runtime.zero import partition_parameters, stage3

    release, reduce = partition_parameters.free_param, stage3.reduce_scatter_coalesced

    def free_param(*arguments: Any) -> Any:
        time.sleep(_SETTLE_SECONDS)
        return release(*arguments)

    def reduce_scatter_coalesced(*arguments: Any) -> Any:
        shares = reduce(*arguments)
        time.sleep(_SETTLE_SECONDS)
        return shares

    partition_parameters.free_param, stage3.reduce_scatter_coalesced = free_param, reduce_scatter_coalesced
    try:
        yield
    finally:
        partition_parameters.free_param, stage3.reduce_scatter_coalesced = release, reduce


class KeptCounter:
    """Adds up what autograd keeps for backward: unique storages, weights and buffers left out.

    Args:
        module: the network, whose parameters and buffers are not counted.
    """

    def __init__(self, module: torch.nn.Module) -> None:
        self._own = {tensor.untyped_storage().data_ptr() for tensor in module.buffers()}
        self._saved: dict[int, int] = {}

    @property
    def total_bytes(self) -> int:
        """Bytes kept by everything that ran under `counting`."""
        return sum(self._saved.values())

    @contextlib.contextmanager
    def counting(self) -> Iterator[None]:
        """Count what is kept while the context lasts; a forward pass belongs in it."""
        with torch.autograd.graph.saved_tensors_hooks(self._keep, lambda tensor: tensor):
            yield

    def _keep(self, tensor: Tensor) -> Tensor:
        # A gathered weight has a storage of the moment, so it is known by what it is.
        parameter = isinstance(tensor, torch.nn.Parameter) or isinstance(tensor._base, torch.nn.Parameter)
        storage = tensor.untyped_storage()
        if not parameter and storage.data_ptr() not in self._own:
            self._saved[storage.data_ptr()] = storage.nbytes()
        return tensor
