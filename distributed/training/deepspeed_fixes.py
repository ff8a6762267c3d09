"""Gradients that DeepSpeed reads back wrong from NVMe, read right.

A gradient of 1 MiB or more goes to a file of its own and comes back into its place in its sub-group's buffer. Where
that place is not a multiple of the drive's block, because smaller tensors lie before it, a direct read fails; DeepSpeed
counts it as done, and the step takes what the buffer held before. Such gradients are read here through the page cache.

Source: DeepSpeed 0.19.8, runtime/swap_tensor/partitioned_optimizer_swapper.py, pipelined_optimizer_swapper.py and
optimizer_utils.py; open(2) on O_DIRECT.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

BLOCK_BYTES = 4096
"""No drive's block is larger; buffers begin at a page."""
_MENDED = "_translution_mended"


def is_aligned(tensor: Tensor) -> bool:
    """Whether a direct read into a tensor is allowed."""
    return tensor.data_ptr() % BLOCK_BYTES == 0


def read_file(path: str, tensor: Tensor) -> None:
    """Fill a contiguous tensor in host memory from the beginning of a file, wherever the tensor lies.

    Raises:
        OSError: if the file is shorter.
    """
    view = memoryview(tensor.view(torch.uint8).numpy().data)
    with open(path, "rb", buffering=0) as file:  # noqa: PTH123 - a Path has no readinto that is shorter
        done = 0
        while done < len(view):
            read = file.readinto(view[done:])
            if not read:
                raise OSError(f"{path}: ends after {done} of {len(view)} bytes")
            done += read


@contextlib.contextmanager
def _without_unaligned(info: Any, buffer: Tensor) -> Iterator[None]:
    """Fill the gradients that no direct read can, and hide them while the block reads the others."""
    every = info.swapped_gradients
    aligned = {}
    for offset, gradient in every.items():
        part = buffer.narrow(0, gradient.offset, gradient.length)
        if is_aligned(part):
            aligned[offset] = gradient
        else:
            read_file(gradient.path, part)
    info.swapped_gradients = aligned
    try:
        yield
    finally:
        info.swapped_gradients = every


def mend_gradient_reads() -> None:
    """Let DeepSpeed's optimizers on NVMe read every gradient right, in this process from here on."""
    from deepspeed.runtime.swap_tensor.optimizer_utils import OptimizerSwapper
    from deepspeed.runtime.swap_tensor.partitioned_optimizer_swapper import PartitionedOptimizerSwapper
    from deepspeed.runtime.swap_tensor.pipelined_optimizer_swapper import PipelinedOptimizerSwapper

    if getattr(OptimizerSwapper, _MENDED, False):
        return
    setattr(OptimizerSwapper, _MENDED, True)
    read_all = PartitionedOptimizerSwapper._swap_in_pinned_gradients
    swap_in = PipelinedOptimizerSwapper._swap_in_optimizer_state

    def swap_in_pinned_gradients(self: Any, aio_handle: Any, parameter: Any, gradient_tensor: Tensor) -> None:
        info = self.swap_params_info[OptimizerSwapper.parameter_id(parameter)]
        with _without_unaligned(info, gradient_tensor):
            if info.swapped_gradients:
                read_all(self, aio_handle, parameter, gradient_tensor)

    def swap_in_optimizer_state(self: Any, aio_handle: Any, parameter: Any) -> Any:
        # It chooses the buffer itself. The direct reads that are not allowed leave it as it was.
        operation = swap_in(self, aio_handle, parameter)
        info = self.swap_params_info.get(OptimizerSwapper.parameter_id(parameter))
        if info is not None and info.swapped_gradients and parameter.grad is not None:
            with _without_unaligned(info, parameter.grad):
                pass
        return operation

    PartitionedOptimizerSwapper._swap_in_pinned_gradients = swap_in_pinned_gradients
    PipelinedOptimizerSwapper._swap_in_optimizer_state = swap_in_optimizer_state
