"""Tensors with a size and a life but no values: torch's allocator and autograd, replayed in plain Python.

A module of the real network has a twin here that allocates what it allocates, in the same order, and
holds on to it for as long. Lives are Python's own: a `Storage` gives its bytes back when the last
reference to it goes, as a tensor does, so a twin written like its original has its original's peaks.
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
    """An operation that autograd remembers: its inputs, what its backward does and what it needs."""

    __slots__ = ("backward", "grad", "inputs", "saved", "site")

    def __init__(self, inputs: Sequence[Tensor], backward: Backward, saved: Sequence[Storage], site: str) -> None:
        self.inputs = tuple(tensor.node for tensor in inputs)
        self.backward = backward
        self.saved = tuple(saved)
        self.site = site
        self.grad: Storage | None = None


class Tensor:
    """A storage, and the operation that gave it if a gradient flows through it."""

    __slots__ = ("node", "storage")

    def __init__(self, storage: Storage, node: Node | None = None) -> None:
        self.storage, self.node = storage, node

    @property
    def size(self) -> int:
        """Bytes of the storage."""
        return self.storage.size


@dataclass(slots=True, eq=False)
class ModuleParams:
    """The parameters of one module: elements of each tensor, in the order of its gradients."""

    numels: tuple[int, ...]
    grads: list[Storage | None] = field(default_factory=list)


class ParameterHooks:
    """How parameters lie in memory and where their gradients go; this one is training without ZeRO.

    Parameters are whole and live throughout, so modules need not fetch them, and gradients stay
    beside them until the optimizer step.
    """

    def fetch(self, weights: ModuleParams, *, backward: bool) -> None:
        """A module is about to run."""

    def release(self, weights: ModuleParams, *, backward: bool) -> None:
        """A module has run."""

    def gradients(self, weights: ModuleParams, grads: list[Storage]) -> None:
        """The gradients of a module's parameters are ready; added to those of earlier micro-batches.

        Whoever takes one out of the list is its only holder.
        """
        if not weights.grads:
            weights.grads = list(grads)

    def finish(self) -> None:
        """The backward pass is over."""


class Tape:
    """Runs twins forward, remembers them, and runs them backward.

    Args:
        memory: where they allocate.
        policy: how parameters are held.
    """

    def __init__(self, memory: MemoryTracker, hooks: ParameterHooks | None = None) -> None:
        self.memory = memory
        self.hooks = hooks or ParameterHooks()
        self.outer: Storage | None = None
        """A gradient that somebody outside holds too, so that nothing is added to it in place."""
        self.casts: list[Storage] = []
        """Copies of parameters that autocast holds until its context ends."""
        self.stopped = False
        """Whether operations only leave their nodes: a checkpoint computes nothing again that nobody keeps."""
        self._nodes: list[Node] | None = []

    def new(self, size: int, what: str = "activations") -> Storage:
        """A storage of so many bytes."""
        return Storage(self.memory, what, 0 if self.stopped else size)

    @contextmanager
    def no_grad(self) -> Iterator[None]:
        """Run operations without remembering them, as under ``torch.no_grad``."""
        before, self._nodes = self._nodes, None
        try:
            yield
        finally:
            self._nodes = before

    def result(
        self, storage: Storage, inputs: Sequence[Tensor], backward: Backward, saved: Sequence[Storage] = ()
    ) -> Tensor:
        """The output of an operation, remembered with its backward and what that keeps."""
        if self._nodes is None:
            return Tensor(storage)
        node = Node(inputs, backward, saved, self.memory.site)
        self._nodes.append(node)
        return Tensor(storage, node)

    def saved_bytes(self) -> int:
        """Bytes that the remembered operations keep for backward here, each storage counted once."""
        saved = [storage for node in self._nodes or [] for storage in node.saved if storage.is_in(self.memory)]
        return sum({id(storage): storage.size for storage in saved}.values())

    def leaf(self, storage: Storage) -> Tensor:
        """A tensor that wants a gradient, which the end of `backward` drops."""
        return self.result(storage, (), lambda grad: ())

    def backward(self, output: Node | None, grad: Storage) -> Storage | None:
        """Run the remembered operations in reverse; the gradient of the first leaf, if there is one."""
        assert output is not None and self._nodes is not None
        output.grad = grad
        del grad
        last = None
        while self._nodes:
            last = self._step(self._nodes.pop())
        return last

    def _step(self, node: Node) -> Storage | None:
        """One operation's backward; what it kept and received is dropped when this returns."""
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
