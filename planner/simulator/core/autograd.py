"""Simulation of torch's allocator and autograd in plain Python: tensors have a size and a lifetime but no values.

A simulated module allocates what the real module allocates, in the same order, and holds it equally long. Lifetimes
are Python's reference counts: a `Storage` frees its bytes when the last reference to it is deleted, as a tensor does.
A simulated module written like the real one, each ``del`` included, therefore has the real one's peaks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeAlias

from .storage import MemoryTracker, Storage

Gradients: TypeAlias = Sequence["Storage | None"]
Backward: TypeAlias = Callable[[Storage], Gradients]


def _spent(grad: Storage) -> Gradients:
    raise AssertionError("a backward ran twice")


class Node:
    """A node of the autograd graph: its inputs, its backward function and the storages saved for backward."""

    __slots__ = ("backward", "grad", "inputs", "saved", "site")

    def __init__(self, inputs: Sequence[Tensor], backward: Backward, saved: Sequence[Storage], site: str) -> None:
        self.inputs = tuple(tensor.node for tensor in inputs)
        self.backward = backward
        self.saved = tuple(saved)
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


class ParameterHooks:
    """Calls from the network to the engine about parameters; this base class is training without ZeRO.

    Without ZeRO every parameter is always in memory in full, so `fetch` and `release` do nothing, and gradients stay
    with the parameters until the optimizer step.
    """

    def fetch(self, weights: ModuleParams, *, backward: bool) -> None:
        """Called before a module runs."""

    def release(self, weights: ModuleParams, *, backward: bool) -> None:
        """Called after a module has run."""

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
        self.stopped = False
        """True once a recomputed block has everything that backward needs: later operations record a node but compute
        nothing, as torch's checkpoint stops early."""
        self._nodes: list[Node] | None = []

    def new(self, size: int, what: str = "activations") -> Storage:
        """Allocate a storage of ``size`` bytes."""
        return Storage(self.memory, what, 0 if self.stopped else size)

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
        del saved
        return None if node.inputs else grad
