"""All patches that training makes to DeepSpeed 0.19.8 and torch; no other module of training or checkpoints makes any.

`patch_nvme_optimizers` fixes two faults of optimizers on NVMe.

Gradient reads: DeepSpeed reads some gradients back wrong from NVMe. A gradient of 1 MiB or more has a file of
its own and is read into its place in the buffer of its sub-group. Where that place is not a multiple of the drive's
block size, because smaller tensors precede it, the direct read fails. DeepSpeed counts it as done, and the step uses
stale values. The patch reads these gradients through the page cache.

State release: the optimizer states of a sub-group are made in pageable memory, by its first update or by loading a
checkpoint. The pipelined swapper copies them to locked buffers, writes those, and still references the originals until
it reads the states again, in the next step: the states of all sub-groups are then in memory at once, 8 bytes per
element of the rank with AdamW. The patch releases them as soon as they are copied.

`check_swap_files`: the swappers' I/O handles compare what they read with what they wrote (swap_checksums.py).

`answer_for_processor`: DeepSpeed asks py-cpuinfo for the processor three times to load one optimizer of the host; each
time py-cpuinfo starts a process that takes over a second. The patch reads the two values that DeepSpeed uses from
/proc/cpuinfo; on another processor than x86-64 it keeps py-cpuinfo's first answer.

`ask_numa_once`: on CPU ranks, DeepSpeed starts `numactl` for every bucket of gradients that it reduces.

`probe_one_op`: to join CPU ranks, DeepSpeed needs to know whether one op can be compiled here, and asks it of all: for
that of NVMe it compiles and links a program.

`import_muon_uncompiled`: every ZeRO optimizer of DeepSpeed imports Muon's module, which hands three functions to
torch's compiler and so imports that: a second of processor time for each rank, though plans have no Muon.

`leave_compiler_out`: optimizers and hooks import torch's compiler only to tell it to leave them out: another second
and 150 MB of each rank, though plans compile nothing.

`settled_collectives`: gloo frees a collective's tensors in its own thread at a random later time. While memory is
traced, each collective ends only once they are free.

Sources: DeepSpeed 0.19.8, runtime/swap_tensor/partitioned_optimizer_swapper.py, pipelined_optimizer_swapper.py and
optimizer_utils.py, runtime/zero/partition_parameters.py, stage3.py and muon/original_muon.py; open(2) on O_DIRECT.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import operator
import platform
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from .swap_checksums import CheckedHandle, SwapChecksums

BLOCK_BYTES = 4096
"""Largest block size of a drive in bytes; buffers are page-aligned."""
_PATCHED = "_translution_patched"
_COMMUNICATION_OP = "deepspeed_shm_comm"
_LEFT_OUT = torch.optim.Optimizer.zero_grad.__code__
"""Code of the functions that torch leaves out of what it compiles."""
_WITHOUT_GRADIENTS = "_use_grad"
"""Name of the code of torch's optimizers around a step, which breaks a compiled graph."""
_SETTLE_SECONDS, _COPIES_SECONDS = 0.0002, 0.002
_LONGEST_SETTLE_SECONDS = 2.0
_EXCHANGES = ("all_reduce", "all_to_all_single", "all_gather_single", "all_gather_into_tensor")
"""Functions of torch.distributed that relation parallelism calls."""
_COLLECTIVES = (
    "all_gather", "all_gather_base", "all_gather_coalesced", "all_gather_into_tensor", "all_reduce",
    "all_reduce_coalesced", "all_to_all_single", "broadcast", "reduce", "reduce_scatter", "reduce_scatter_tensor",
)  # fmt: skip


def freeze_imports() -> None:
    """Import DeepSpeed, and keep garbage collections, of which it makes some, from going through all that is imported.

    What is imported lives as long as the process. Call it before the first tensor.
    """
    import deepspeed.runtime.engine  # noqa: F401  # imported for the effect of loading

    gc.freeze()
    bindings = sys.modules.get("triton._C.libtriton")
    if bindings is not None and type(bindings.ir.location).__module__ == "nanobind":
        # Those of Triton 3.9 print what is not collected at exit. Collecting it takes half a second.
        atexit.register(gc.unfreeze)


def answer_for_processor(path: Path = Path("/proc/cpuinfo")) -> None:
    """Answer DeepSpeed's questions about the processor in place of py-cpuinfo.

    Args:
        path: Linux's description of the processor.

    Source: DeepSpeed 0.19.8, ops/op_builder/builder.py (`cpu_arch`, `simd_width`).
    """
    import cpuinfo

    if not hasattr(cpuinfo.get_cpu_info, "cache_info"):
        described = _described_processor(path)
        ask = cpuinfo.get_cpu_info if described is None else lambda: described
        cpuinfo.get_cpu_info = functools.cache(ask)


def ask_numa_once() -> None:
    """Let DeepSpeed ask for the cores of the NUMA nodes once per process.

    Source: DeepSpeed 0.19.8, utils/numa.py, accelerator/cpu_accelerator.py (`device_count`), runtime/zero/stage3.py and
    runtime/comm/coalesced_collectives.py (`reduce_scatter_coalesced`).
    """
    from deepspeed.utils import numa

    if not hasattr(numa.get_numa_cores, "cache_info"):
        numa.get_numa_cores = functools.cache(numa.get_numa_cores)


def probe_one_op() -> None:
    """Let DeepSpeed know of the op with which CPU ranks communicate, and of no other, whether it can be compiled here.

    Source: DeepSpeed 0.19.8, ops/__init__.py (`_probe_compatible_ops`), comm/torch.py (`build_shm_op`).
    """
    import deepspeed.ops
    from deepspeed.ops.op_builder.all_ops import ALL_OPS
    from deepspeed.ops.op_builder.builder import probe_is_compatible

    if "__compatible_ops__" not in vars(deepspeed.ops):
        found = {name: probe_is_compatible(op) for name, op in ALL_OPS.items() if name == _COMMUNICATION_OP}
        deepspeed.ops.__compatible_ops__ = found


def import_muon_uncompiled() -> None:
    """Import DeepSpeed's Muon without torch's compiler, which the first call of its functions would need.

    Source: DeepSpeed 0.19.8, runtime/compiler.py (`compile`), runtime/zero/stage3.py (`__init__`).
    """
    from deepspeed.runtime import compiler

    compile_, compiler.compile = compiler.compile, lambda: compiler.dummy_decorator
    try:
        import deepspeed.runtime.zero.muon.original_muon  # noqa: F401  # imported for the effect of loading
    finally:
        compiler.compile = compile_


def leave_compiler_out() -> None:
    """Let optimizers and DeepSpeed's hooks run without torch's compiler, for the rest of this process.

    They do the same as before, for nothing is compiled. Blocks that torch recomputes still import the compiler.

    Source: torch 2.13, _compile.py (`_disable_dynamo`), compiler/__init__.py (`disable`), optim/optimizer.py
    (`_use_grad_for_differentiable`); DeepSpeed 0.19.8, runtime/compiler.py and runtime/zero/parameter_offload.py.
    """
    if torch.compiler.disable is _as_it_is:
        return
    torch.compiler.disable = _as_it_is  # type: ignore[assignment]
    modules = [module for name, module in list(sys.modules.items()) if name.partition(".")[0] == "deepspeed"]
    owners: list[Any] = [torch.optim.Optimizer, *modules]
    owners += [kind for module in modules for kind in vars(module).values() if isinstance(kind, type)]
    for value in (value for owner in owners for value in vars(owner).values()):
        if getattr(value, "__code__", None) is _LEFT_OUT and hasattr(value, "__wrapped__"):
            # Where `_disable_dynamo` looks for what the compiler has made of the function.
            value.__wrapped__.__dict__["__dynamo_disable"] = value.__wrapped__
    for optimizer in torch.optim.Optimizer.__subclasses__():
        step: Any = vars(optimizer).get("step")
        if getattr(getattr(step, "__code__", None), "co_name", "") == _WITHOUT_GRADIENTS:
            optimizer.step = torch.no_grad()(step.__wrapped__)  # type: ignore[method-assign]


def _as_it_is(function: Any = None, *_: object, **__: object) -> Any:
    """Stand in for `torch.compiler.disable`: return the function, or a decorator that returns it."""
    return _as_it_is if function is None else function


def _described_processor(path: Path) -> dict[str, object] | None:
    """Return the architecture and flags of an x86-64 processor, as py-cpuinfo names them; None for any other."""
    if platform.machine() != "x86_64":
        return None
    with contextlib.suppress(OSError), path.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            name, _, value = line.partition(":")
            if name.strip() == "flags":
                return {"arch": "X86_64", "flags": sorted(value.split())}
    return None


def is_aligned(tensor: Tensor) -> bool:
    """True if a direct read (O_DIRECT) into the tensor is possible."""
    return tensor.data_ptr() % BLOCK_BYTES == 0


def read_file(path: str, tensor: Tensor) -> None:
    """Fill a contiguous tensor in host memory, of any alignment, from the start of a file.

    Raises:
        OSError: if the file is shorter than the tensor.
    """
    view = memoryview(tensor.view(torch.uint8).numpy().data)
    with Path(path).open("rb", buffering=0) as file:
        done = 0
        while done < len(view):
            read = file.readinto(view[done:])
            if not read:
                raise OSError(f"{path}: ends after {done} of {len(view)} bytes")
            done += read


@contextlib.contextmanager
def _without_unaligned(aio_handle: Any, info: Any, buffer: Tensor) -> Iterator[None]:
    """Read the unaligned gradients into the buffer, and hide them from DeepSpeed within the block."""
    checksums: SwapChecksums | None = getattr(aio_handle, "checksums", None)
    every = info.swapped_gradients
    aligned = {}
    for offset, gradient in every.items():
        part = buffer.narrow(0, gradient.offset, gradient.length)
        if is_aligned(part):
            aligned[offset] = gradient
        else:
            if checksums is not None:
                checksums.require_size(gradient.path)
            read_file(gradient.path, part)
            if checksums is not None:
                checksums.compare(gradient.path, part)
    info.swapped_gradients = aligned
    try:
        yield
    finally:
        info.swapped_gradients = every


def check_swap_files(rank: int) -> SwapChecksums:
    """Let the swappers that this process makes from now on compare what they read from NVMe with what they wrote.

    Args:
        rank: number of the rank, for messages.

    Returns:
        The checksums.
    """
    from deepspeed.ops.op_builder import AsyncIOBuilder
    from deepspeed.runtime.swap_tensor import (
        partitioned_optimizer_swapper,
        partitioned_param_swapper,
        pipelined_optimizer_swapper,
    )

    checksums = SwapChecksums(rank)

    class CheckedBuilder(AsyncIOBuilder):
        def load(self, verbose: bool = True) -> Any:
            library = super().load(verbose)
            return SimpleNamespace(aio_handle=lambda **options: CheckedHandle(library.aio_handle(**options), checksums))

    for module in (partitioned_optimizer_swapper, partitioned_param_swapper, pipelined_optimizer_swapper):
        module.AsyncIOBuilder = CheckedBuilder
    return checksums


def patch_nvme_optimizers() -> None:
    """Make DeepSpeed's NVMe optimizers read every gradient and release every state, for the rest of this process."""
    from deepspeed.runtime.swap_tensor.optimizer_utils import OptimizerSwapper

    if not getattr(OptimizerSwapper, _PATCHED, False):
        setattr(OptimizerSwapper, _PATCHED, True)
        _patch_gradient_reads()
        _patch_state_release()


def _patch_gradient_reads() -> None:
    from deepspeed.runtime.swap_tensor.optimizer_utils import OptimizerSwapper
    from deepspeed.runtime.swap_tensor.partitioned_optimizer_swapper import PartitionedOptimizerSwapper
    from deepspeed.runtime.swap_tensor.pipelined_optimizer_swapper import PipelinedOptimizerSwapper

    read_all = PartitionedOptimizerSwapper._swap_in_pinned_gradients
    swap_in = PipelinedOptimizerSwapper._swap_in_optimizer_state

    def swap_in_pinned_gradients(self: Any, aio_handle: Any, parameter: Any, gradient_tensor: Tensor) -> None:
        info = self.swap_params_info[OptimizerSwapper.parameter_id(parameter)]
        with _without_unaligned(aio_handle, info, gradient_tensor):
            if info.swapped_gradients:
                read_all(self, aio_handle, parameter, gradient_tensor)

    def swap_in_optimizer_state(self: Any, aio_handle: Any, parameter: Any) -> Any:
        # The original chooses the buffer itself, and its unaligned direct reads leave the buffer unchanged: they are
        # repeated afterwards.
        operation = swap_in(self, aio_handle, parameter)
        info = self.swap_params_info.get(OptimizerSwapper.parameter_id(parameter))
        if info is not None and info.swapped_gradients and parameter.grad is not None:
            with _without_unaligned(aio_handle, info, parameter.grad):
                pass
        return operation

    PartitionedOptimizerSwapper._swap_in_pinned_gradients = swap_in_pinned_gradients
    PipelinedOptimizerSwapper._swap_in_optimizer_state = swap_in_optimizer_state


def _patch_state_release() -> None:
    from deepspeed.runtime.swap_tensor.pipelined_optimizer_swapper import PipelinedOptimizerSwapper

    swap_out = PipelinedOptimizerSwapper._swap_out_optimizer_state

    def swap_out_optimizer_state(self: Any, aio_handle: Any, parameter: Any, swap_in_op: Any) -> Any:
        operation = swap_out(self, aio_handle, parameter, swap_in_op)
        # The operation references the buffers that are written; the parameter and its states need no memory.
        swap_in_op.param_info.release_memory()
        return operation

    PipelinedOptimizerSwapper._swap_out_optimizer_state = swap_out_optimizer_state


def _references(tensor: Tensor) -> int:
    """Return the number of references to a tensor's storage."""
    count: int = torch._C._storage_Use_Count(tensor.data.untyped_storage()._cdata)
    return count


class _Done:
    """Handle of a collective that has finished."""

    def wait(self) -> None:
        """Return at once."""

    def is_completed(self) -> bool:
        """Return True."""
        return True


def _settled(collective: Callable[..., Any]) -> Callable[..., Any]:
    """Return a form of a collective that ends once no other thread references its tensors."""

    @functools.wraps(collective)
    def run(*arguments: Any, **options: Any) -> Any:
        values = [*arguments, *options.values()]
        lists = [value if isinstance(value, (list, tuple)) else [value] for value in values]
        tensors = [value for part in lists for value in part if isinstance(value, Tensor)]
        before = [_references(tensor) for tensor in tensors]
        work = collective(*arguments, **options)
        if work is None:
            done = None
        else:
            work.wait()
            done = _Done()
            del work
        began = time.monotonic()
        while any(map(operator.gt, map(_references, tensors), before)):
            if time.monotonic() - began > _LONGEST_SETTLE_SECONDS:
                break
            time.sleep(_SETTLE_SECONDS)
        # The thread frees gloo's own copies right before or after these references.
        time.sleep(_COPIES_SECONDS)
        return done

    return run


@contextlib.contextmanager
def settled_collectives() -> Iterator[None]:
    """Let each collective, within the block, end once gloo's thread has freed its tensors.

    Otherwise the thread frees them before or after the next tensors are made, and no two runs have the same peak.
    Asynchronous collectives end before they return, too: their tensors exist from the call on in any case.
    """
    from deepspeed.comm.torch import TorchBackend

    # DeepSpeed keeps torch's functions; the exchanges of relation parallelism ask for them at each call.
    owners = [(TorchBackend, name) for name in _COLLECTIVES]
    owners += [(torch.distributed, name) for name in _EXCHANGES if hasattr(torch.distributed, name)]
    originals = [(owner, name, getattr(owner, name)) for owner, name in owners]
    for owner, name, collective in originals:
        setattr(owner, name, _settled(collective))
    try:
        yield
    finally:
        for owner, name, collective in originals:
            setattr(owner, name, collective)
