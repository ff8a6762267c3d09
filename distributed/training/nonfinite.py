"""Where a run stops being finite: the first layer, parameter or gradient, and when skipped steps are too many."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..data.base import Samples
from .engine import EngineRank

MOST_SKIPPED = 20
"""Steps in a row that fp16's loss scaling may skip before a run counts as lost."""
_LEAST_SCALE = 1.0
"""As the DeepSpeed configuration of a plan has it."""


def _tensors(value: Any) -> Iterator[Tensor]:
    """Floating tensors among a module's arguments or results."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
    elif isinstance(value, list | tuple):
        for entry in value:
            yield from _tensors(entry)


def _finite(value: Any) -> bool:
    return all(bool(torch.isfinite(tensor).all()) for tensor in _tensors(value))


class _Watch:
    """Looks at one module as it runs, and notes what is not finite.

    Args:
        name: the module's, in its network.
        found: takes what is found.
    """

    def __init__(self, name: str, found: list[str]) -> None:
        self._name, self._found = name, found

    def before(self, module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        """What goes in, and the module's own parameters."""
        if not _finite([arguments, keywords]):
            self._found.append(f"{self._name or 'network'} (input)")
        for name, parameter in module.named_parameters(self._name, recurse=False):
            if not _finite(parameter):
                self._found.append(f"{name} (parameter)")

    def after(self, _: nn.Module, __: tuple[Any, ...], result: Any) -> None:
        """What comes out."""
        if not _finite(result):
            self._found.append(f"{self._name or 'network'} (output)")


def first_not_finite(network: nn.Module, forward: Callable[[], Tensor]) -> str | None:
    """The first thing in a forward pass that is not finite, by its name in the network.

    Modules are looked at as they run: what goes in, their own parameters, and what comes out. Under
    ZeRO-3 a parameter is whole then, and every rank must make the same call.

    Args:
        network: what runs; DeepSpeed's hooks must have been set before.
        forward: runs it and gives the loss.

    Returns:
        ``blocks.1.ffn.up.weight (parameter)``, ``blocks.0.operator (output)``, ``blocks.0.ffn_norm
        (input)`` or ``loss``; None if all is finite.
    """
    found: list[str] = []
    hooks = []
    for name, module in network.named_modules():
        watch = _Watch(name, found)
        hooks.append(module.register_forward_pre_hook(watch.before, with_kwargs=True))
        hooks.append(module.register_forward_hook(watch.after))
    try:
        with torch.no_grad():
            loss = forward()
    finally:
        for hook in hooks:
            hook.remove()
    return next(iter(found), None if _finite(loss) else "loss")


def first_bad_gradient(network: nn.Module, gradient: Callable[[nn.Parameter], Tensor | None]) -> str | None:
    """The parameter nearest to the loss whose gradient is not finite: backward came to it first.

    Args:
        network: holds the parameters.
        gradient: gives a parameter's whole gradient; under ZeRO every rank must make the same call.
    """
    for name, parameter in reversed(list(network.named_parameters())):
        if not _finite(gradient(parameter)):
            return name
    return None


def is_finite_norm(norm: float | None) -> bool:
    """Whether a gradient norm, as DeepSpeed gives it, is one: it may be -1 for one that is not, or None for none."""
    return norm is None or (math.isfinite(norm) and norm >= 0)


class SkippedSteps:
    """Tells when steps that were skipped for their gradients mean that a run is lost.

    Args:
        scaled: whether the loss is scaled, as in fp16, where a step is skipped now and then to find the scale.
    """

    def __init__(self, *, scaled: bool) -> None:
        self._scaled = scaled
        self.in_a_row = 0

    def lost(self, *, finite: bool, scale: float) -> bool:
        """Take a step.

        Args:
            finite: whether its gradients were finite.
            scale: the loss scale after it.
        """
        self.in_a_row = 0 if finite else self.in_a_row + 1
        if finite or not self._scaled:
            return not finite
        return self.in_a_row >= MOST_SKIPPED or scale <= _LEAST_SCALE

    def text(self, scale: float) -> str:
        """What is wrong, for people."""
        often = f" in {self.in_a_row} steps in a row, at a loss scale of {scale:g}" if self._scaled else ""
        return f"the norm of the gradients is not finite{often}"


def find_in_forward(rank: EngineRank, batches: list[Samples]) -> str:
    """What is not finite first when a step's micro-batches run forward.

    Args:
        rank: this rank, whose parameters are those of the step.
        batches: its micro-batches.
    """
    rank.seed_step()
    own = [first_not_finite(rank.engine.module, partial(rank.loss, batch)) for batch in batches]
    everywhere: list[str | None] = [None] * rank.ranks
    torch.distributed.all_gather_object(everywhere, next((text for text in own if text), None))
    for number, text in enumerate(everywhere):
        if text:
            return f"first not finite: {text}" + (f", on rank {number}" if rank.ranks > 1 else "")
    return "all is finite in a second forward pass"


def find_in_backward(rank: EngineRank, batches: list[Samples], passes: Callable[[list[Samples]], float]) -> str:
    """Where a step's gradients are first not finite; nothing if that does not show again.

    Args:
        rank: this rank, whose parameters are those of the step.
        batches: its micro-batches.
        passes: runs them forward and backward, and gives the mean loss.
    """
    from deepspeed.utils import safe_get_full_grad

    rank.seed_step()
    (loss,) = rank.mean_over_ranks(passes(batches))
    name = first_bad_gradient(rank.engine.module, safe_get_full_grad) if math.isfinite(loss) else None
    return f": first not finite, from the loss backwards: {name} (gradient)" if name else ""
