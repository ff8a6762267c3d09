"""Where a run stops being finite: the first layer, parameter or gradient; and when skipped steps end the run."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..data.base import Samples
from .engine import Engine

MAX_SKIPPED_STEPS = 20
"""Consecutive steps that fp16 loss scaling may skip before the run counts as diverged."""
_MIN_LOSS_SCALE = 1.0
"""Lowest loss scale, as in the DeepSpeed configuration of a plan."""


def _tensors(value: Any) -> Iterator[Tensor]:
    """Floating-point tensors among a module's arguments or results."""
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


class _ModuleProbe:
    """Forward hooks that note which values of one module are not finite.

    Args:
        name: the module's name in its network.
        found: list that receives the names of non-finite values.
    """

    def __init__(self, name: str, found: list[str]) -> None:
        self._name, self._found = name, found

    def before(self, module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        """Check the inputs and the module's own parameters."""
        if not _finite([arguments, keywords]):
            self._found.append(f"{self._name or 'network'} (input)")
        for name, parameter in module.named_parameters(self._name, recurse=False):
            if not _finite(parameter):
                self._found.append(f"{name} (parameter)")

    def after(self, _: nn.Module, __: tuple[Any, ...], result: Any) -> None:
        """Check the outputs."""
        if not _finite(result):
            self._found.append(f"{self._name or 'network'} (output)")


def first_nonfinite_value(network: nn.Module, forward: Callable[[], Tensor]) -> str | None:
    """Name the first value of a forward pass that is not finite.

    Checks inputs, own parameters and outputs of each module as it runs, because under ZeRO-3 its parameters are
    gathered only then. Under ZeRO-3 every rank must make the same call.

    Args:
        network: the network; DeepSpeed must have registered its hooks before.
        forward: runs the network and returns the loss.

    Returns:
        For example ``blocks.1.ffn.up.weight (parameter)``, ``blocks.0.operator (output)``, ``blocks.0.ffn_norm
        (input)`` or ``loss``; None if everything is finite.
    """
    found: list[str] = []
    hooks = []
    for name, module in network.named_modules():
        probe = _ModuleProbe(name, found)
        hooks.append(module.register_forward_pre_hook(probe.before, with_kwargs=True))
        hooks.append(module.register_forward_hook(probe.after))
    try:
        with torch.no_grad():
            loss = forward()
    finally:
        for hook in hooks:
            hook.remove()
    return next(iter(found), None if _finite(loss) else "loss")


def first_nonfinite_gradient(network: nn.Module, gradient: Callable[[nn.Parameter], Tensor | None]) -> str | None:
    """Name the first parameter in backward order whose gradient is not finite; None if all are finite.

    Args:
        network: holds the parameters.
        gradient: returns a parameter's full gradient; under ZeRO every rank must make the same call.
    """
    for name, parameter in reversed(list(network.named_parameters())):
        if not _finite(gradient(parameter)):
            return name
    return None


def is_finite_norm(norm: float | None) -> bool:
    """True if the norm is finite. DeepSpeed returns -1 on overflow, None when it was not computed."""
    return norm is None or (math.isfinite(norm) and norm >= 0)


class SkippedSteps:
    """Decides when steps skipped because of their gradients mean that the run has diverged.

    Args:
        scaled: whether the loss is scaled, as in fp16, where DeepSpeed skips single steps to adjust the scale.
    """

    def __init__(self, *, scaled: bool) -> None:
        self._scaled = scaled
        self.consecutive = 0
        """Steps skipped since the last one that was applied."""

    def is_diverged(self, *, finite: bool, scale: float) -> bool:
        """Count a step; return True if the run has diverged.

        Args:
            finite: whether the step's gradients were finite.
            scale: loss scale after the step.
        """
        self.consecutive = 0 if finite else self.consecutive + 1
        if finite or not self._scaled:
            return not finite
        return self.consecutive >= MAX_SKIPPED_STEPS or scale <= _MIN_LOSS_SCALE

    def describe(self, scale: float) -> str:
        """Describe what is wrong, for an error message."""
        often = f" in {self.consecutive} steps in a row, at a loss scale of {scale:g}" if self._scaled else ""
        return f"the norm of the gradients is not finite{often}"


def find_nonfinite_layer(engine: Engine, batches: list[Samples], step: int) -> str:
    """Repeat a step's forward passes and describe the first value that is not finite on any rank.

    Args:
        engine: this rank's engine, with the parameters of the step.
        batches: the step's micro-batches.
        step: number of the step, from 0.
    """
    engine.seed_step(step)
    own = [first_nonfinite_value(engine.module, partial(engine.loss, batch)) for batch in batches]
    everywhere: list[str | None] = [None] * engine.world_size
    torch.distributed.all_gather_object(everywhere, next((text for text in own if text), None))
    for number, text in enumerate(everywhere):
        if text:
            return f"first not finite: {text}" + (f", on rank {number}" if engine.world_size > 1 else "")
    return "everything is finite in a second forward pass"


def find_nonfinite_gradient(
    engine: Engine, batches: list[Samples], step: int, forward_backward: Callable[[list[Samples]], float]
) -> str:
    """Repeat a step's passes and describe the first gradient that is not finite; empty if all are finite now.

    Args:
        engine: this rank's engine, with the parameters of the step.
        batches: the step's micro-batches.
        step: number of the step, from 0.
        forward_backward: runs micro-batches forward and backward and returns their mean loss.
    """
    from deepspeed.utils import safe_get_full_grad

    engine.seed_step(step)
    (loss,) = engine.mean_over_ranks(forward_backward(batches))
    name = first_nonfinite_gradient(engine.module, safe_get_full_grad) if math.isfinite(loss) else None
    return f": first not finite, from the loss backwards: {name} (gradient)" if name else ""
