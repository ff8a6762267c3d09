"""Simulation of torch's allocator and autograd in plain Python: tensors have a size and a lifetime but no values.

`MemoryTracker` counts the live bytes and peaks of one tier, `RankMemory` has a tracker per tier of a rank, and `Tape`
runs simulated modules forward and backward. A simulated module allocates what the real module allocates, in the same
order, and holds it equally long. Lifetimes are Python's reference counts: a `Storage` frees its bytes when the last
reference to it is deleted, as a tensor does. A simulated module written like the real one, each ``del`` included,
therefore has the real one's peaks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TypeAlias

from ..common.phases import Tier

BACKEND_COPIES = "copies of the CPU backend"
"""Category of what a process group allocates by itself."""

Event: TypeAlias = tuple[str, str, str, int]
"""Phase, site in the schedule, category of the storage, and bytes: positive if allocated, negative if freed."""


@dataclass(frozen=True, slots=True)
class Peak:
    """The highest number of live bytes within a phase."""

    total_bytes: int
    live_bytes: dict[str, int]
    """Live bytes at the peak by category."""
    site: str
    """Where in the schedule the peak occurred."""


class MemoryTracker:
    """The live bytes of one memory by category, and the peak of every phase.

    Args:
        record: store every event, for a timeline.
        ignored: categories that are not counted.
    """

    def __init__(self, *, record: bool = False, ignored: frozenset[str] = frozenset()) -> None:
        self._ignored = ignored
        self.live: dict[str, int] = {}
        self.total = 0
        self.site = ""
        self.events: list[Event] | None = [] if record else None
        self.peaks: dict[str, Peak] = {}
        self._phase = ""
        self._peak = -1
        self._peak_site = ""

    def allocate(self, what: str, size: int) -> None:
        """Add live bytes of a category."""
        if what in self._ignored:
            return
        live = self.live
        live[what] = live.get(what, 0) + size
        self.total += size
        if self.events is not None:
            self.events.append((self._phase, self.site, what, size))
        if self.total > self._peak:
            self._peak, self._peak_site = self.total, self.site

    def free(self, what: str, size: int) -> None:
        """Subtract live bytes of a category."""
        if what in self._ignored:
            return
        if self.total == self._peak:
            self._note()
        self.live[what] -= size
        self.total -= size
        if self.events is not None:
            self.events.append((self._phase, self.site, what, -size))

    def visit(self, what: str, *sizes: int) -> None:
        """Add live bytes of a category together, and subtract them again."""
        if self.events is None:
            # Without a record only the sum counts, and only where it is a new peak.
            sizes = (sum(sizes),)
            if self.total + sizes[0] < self._peak and what in self.live:
                return
        for size in sizes:
            self.allocate(what, size)
        for size in reversed(sizes):
            self.free(what, size)

    def _note(self) -> None:
        """Store the composition of the phase's peak; called when bytes are about to be freed after a new peak."""
        noted = self.peaks.get(self._phase)
        if noted is None or noted.total_bytes < self._peak:
            self.peaks[self._phase] = Peak(self._peak, dict(self.live), self._peak_site)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Attribute the events of the block to a phase; a phase that occurs again keeps its higher peak."""
        if self.total == self._peak:
            self._note()
        before = self._phase, self._peak, self._peak_site
        earlier = self.peaks.get(name)
        self._phase, self._peak = name, -1 if earlier is None else earlier.total_bytes
        if self.total > self._peak:
            self._peak, self._peak_site = self.total, self.site
            self._note()
        try:
            yield
        finally:
            if self.total == self._peak:
                self._note()
            self._phase, self._peak, self._peak_site = before


class Storage:
    """Bytes that are allocated until the last reference to this object is deleted."""

    __slots__ = ("_memory", "size", "what")

    def __init__(self, memory: MemoryTracker, what: str, size: int) -> None:
        self._memory, self.what, self.size = memory, what, size
        memory.allocate(what, size)

    def is_in(self, memory: MemoryTracker) -> bool:
        """Return True if this storage is allocated in ``memory``."""
        return self._memory is memory

    def __del__(self) -> None:
        self._memory.free(self.what, self.size)


def next_power_of_two(size: int) -> int:
    """Return the smallest power of two not below ``size``: what torch's pinned allocator allocates.

    Source: torch 2.13, CachingHostAllocator.h.
    """
    return 1 << (size - 1).bit_length() if size > 0 else 0


class RankMemory:
    """Live bytes and peaks of one rank on every tier.

    The device of a CPU rank is the host: what DeepSpeed allocates on either is one tier, "host", which torch's CPU
    allocator counts. A CPU rank pins no tensors; only the locked buffers of the I/O library are on the tier
    "pinned", and torch's allocator does not count them.

    Args:
        device: "cpu" or "cuda".
        record: store every event, for a timeline.
        alone: True for a CPU rank without peers: its process group makes no copies.
    """

    def __init__(self, device: str, *, record: bool = False, alone: bool = False) -> None:
        self.on_cpu = device == "cpu"
        self.uses_gloo = self.on_cpu and not alone
        self.host = MemoryTracker(record=record)
        self.device = self.host if self.on_cpu else MemoryTracker(record=record)
        self.pinned = MemoryTracker(record=record)
        self.nvme = MemoryTracker(record=record)

    @property
    def tiers(self) -> dict[Tier, MemoryTracker]:
        """The memory of each tier that this rank has."""
        shared = {Tier.HOST: self.host, Tier.PINNED: self.pinned, Tier.NVME: self.nvme}
        return shared if self.on_cpu else {Tier.DEVICE: self.device, **shared}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Attribute the events of the block to a phase on every tier."""
        with ExitStack() as stack:
            for memory in self.tiers.values():
                memory.site = name
                stack.enter_context(memory.phase(name))
            yield

    def at(self, site: str) -> None:
        """Set the site in the schedule to which the following events belong."""
        for memory in self.tiers.values():
            memory.site = site

    def pin(self, what: str, size: int) -> Storage:
        """Allocate a host tensor with ``pin_memory``; a GPU rank's is rounded up by torch's pinned allocator."""
        return Storage(self.host, what, size) if self.on_cpu else Storage(self.pinned, what, next_power_of_two(size))

    def lock(self, what: str, size: int) -> Storage:
        """Allocate a locked buffer of the I/O library, which is not rounded (DeepSpeed, csrc/aio)."""
        return Storage(self.pinned, what, size)

    def add_transient(self, *pieces: tuple[MemoryTracker, str, int]) -> None:
        """Allocate the pieces (memory, category, bytes) together and free them again."""
        held = [Storage(memory, what, size) for memory, what, size in pieces if size]
        held.clear()


Gradients: TypeAlias = Sequence["Storage | None"]
Backward: TypeAlias = Callable[[Storage], Gradients]


def _spent(grad: Storage) -> Gradients:
    raise AssertionError("a backward ran twice")


class Passed(list[Storage]):
    """Saved storages that the backward function takes out of this list, to free each before it returns."""


class Node:
    """A node of the autograd graph: its inputs, its backward function and the storages saved for backward."""

    __slots__ = ("backward", "grad", "inputs", "saved", "site")

    def __init__(self, inputs: Sequence[Tensor], backward: Backward, saved: Sequence[Storage], site: str) -> None:
        self.inputs = tuple(tensor.node for tensor in inputs)
        self.backward = backward
        self.saved: Sequence[Storage] = saved if isinstance(saved, Passed) else tuple(saved)
        self.site = site
        self.grad: Storage | None = None


class Tensor:
    """A storage, and the node that produced it if a gradient flows through it."""

    __slots__ = ("node", "storage")

    def __init__(self, storage: Storage, node: Node | None = None) -> None:
        self.storage, self.node = storage, node

    @property
    def size(self) -> int:
        """Bytes of the storage."""
        return self.storage.size


@dataclass(slots=True, eq=False)
class ModuleParams:
    """The parameters of one module: the number of elements of each tensor, and the gradients in the same order."""

    numels: tuple[int, ...]
    grads: list[Storage | None] = field(default_factory=list)
    shared: bool = False
    """Whether two modules have these parameters."""
    waiting: list[Storage] = field(default_factory=list)
    """Gradients of the first of these modules, until the second's are added."""
    lengths: tuple[int, ...] = ()
    """Length of each tensor's first dimension, which FSDP2 splits; empty for tensors of one dimension."""


class ParameterHooks:
    """Calls from the network to the engine about parameters; this base class is training without ZeRO.

    Without ZeRO every parameter is always in memory in full, so `fetch` and `release` do nothing, and gradients stay
    with the parameters until the optimizer step.
    """

    averages_over_group: bool = False
    """Whether each gradient, but for those of tables, is averaged over a relation group in a tensor of its own."""

    def fetch(self, weights: ModuleParams, *, backward: bool) -> None:
        """Called before a module runs."""

    def release(self, weights: ModuleParams, *, backward: bool) -> None:
        """Called after a module has run."""

    def gathered(self, weights: ModuleParams) -> tuple[Storage, ...]:
        """Return the storages that `fetch` has gathered for a module, and that `release` frees."""
        return ()

    def gradients(self, weights: ModuleParams, grads: list[Storage]) -> None:
        """Called when a module's gradients are ready; they are added to those of earlier micro-batches.

        The list holds the only reference to each gradient: an implementation that pops a gradient decides when it is
        freed.
        """
        if not weights.grads:
            weights.grads = list(grads)

    def finish(self) -> None:
        """Called when the backward pass has ended."""


class Tape:
    """Record simulated operations in forward and run their backward functions in reverse order.

    Args:
        memory: the memory in which operations allocate.
        hooks: the engine; None is training without ZeRO.
    """

    def __init__(self, memory: MemoryTracker, hooks: ParameterHooks | None = None) -> None:
        self.memory = memory
        self.hooks = hooks or ParameterHooks()
        self.outer: Storage | None = None
        """A gradient that is referenced outside of the tape as well, so torch does not accumulate into it in place."""
        self.casts: list[Storage] = []
        """Casts of parameters that autocast caches until its context ends."""
        self.recomputes = False
        """True while torch's checkpoint recomputes: it holds every tensor that an operation saves, so also a gathered
        parameter after its release, until backward takes it."""
        self.stopped = False
        """True once a recomputed block has everything that backward needs: later operations record a node but compute
        nothing, as torch's checkpoint stops early."""
        self._nodes: list[Node] | None = []
        self._waiting: list[Callable[[], None]] = []

    def new(self, size: int, what: str = "activations") -> Storage:
        """Allocate a storage of ``size`` bytes."""
        return Storage(self.memory, what, 0 if self.stopped else size)

    def new_transient(self, what: str, *sizes: int) -> None:
        """Allocate storages together, those of 0 bytes left out, and free them at once."""
        if any(sizes):
            self.memory.visit(what, *(0 if self.stopped else size for size in sizes if size))

    @contextmanager
    def no_grad(self) -> Iterator[None]:
        """Run operations without recording them, as under ``torch.no_grad``."""
        before, self._nodes = self._nodes, None
        try:
            yield
        finally:
            self._nodes = before

    def result(
        self, storage: Storage, inputs: Sequence[Tensor], backward: Backward, saved: Sequence[Storage] = ()
    ) -> Tensor:
        """Return the output tensor of an operation, and record its backward function and the storages it saves."""
        if self._nodes is None:
            return Tensor(storage)
        node = Node(inputs, backward, saved, self.memory.site)
        self._nodes.append(node)
        return Tensor(storage, node)

    def kept_weights(self, weights: ModuleParams) -> tuple[Storage, ...]:
        """Return what an operation that saves a module's parameters keeps of them after their release."""
        return self.hooks.gathered(weights) if self.recomputes else ()

    def saved_bytes(self) -> int:
        """Return the bytes in this memory that recorded operations save for backward; each storage counts once."""
        saved = [storage for node in self._nodes or [] for storage in node.saved if storage.is_in(self.memory)]
        return sum({id(storage): storage.size for storage in saved}.values())

    def leaf(self, storage: Storage) -> Tensor:
        """Return a tensor that requires a gradient; `backward` returns the gradient of the first leaf."""
        return self.result(storage, (), lambda grad: ())

    def backward(self, output: Node | None, grad: Storage) -> Storage | None:
        """Run the recorded operations in reverse; return the gradient of the first leaf, None without a leaf."""
        assert output is not None and self._nodes is not None
        output.grad = grad
        del grad
        last = None
        while self._nodes:
            last = self._step(self._nodes.pop())
        return last

    def after(self, call: Callable[[], None]) -> None:
        """Call this as soon as what the running operation has saved, and its gradient, are freed.

        So does autograd with the functions that accumulate a parameter's gradient, and with their hooks.
        """
        self._waiting.append(call)

    def _step(self, node: Node) -> Storage | None:
        """Run the backward of one operation; its saved storages and its gradient are freed when this returns."""
        saved, node.saved = node.saved, ()
        backward, node.backward = node.backward, _spent
        grad, node.grad = node.grad, None
        if grad is None:
            return None
        self.memory.site = f"{node.site}, backward"
        for source, result in zip(node.inputs, backward(grad), strict=True):
            if source is None or result is None:
                continue
            if source.grad is None:
                source.grad = result
            elif source.grad is self.outer:
                source.grad = self.new(result.size, result.what)
            # Otherwise a second gradient is added to the first one in place.
        del saved, backward
        last = None if node.inputs else grad
        del grad
        for call in self._waiting:
            call()
        self._waiting.clear()
        return last
