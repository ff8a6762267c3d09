"""Finding the first non-finite value or gradient, and deciding when a run has diverged."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.runs import TINY
from torch import Tensor, nn

from translution.distributed.training.nonfinite import (
    MAX_SKIPPED_STEPS,
    SkippedSteps,
    first_nonfinite_gradient,
    first_nonfinite_value,
    is_finite_norm,
)
from translution.models import build
from translution.planner.config.model import parse_model_spec
from translution.planner.config.model_base import OPERATORS

GPT = {"family": "gpt", "context": 6, "vocabulary": 11, "dim": 16, "depth": 2, "heads": 2}


def network_of(model: dict[str, Any], **changes: Any) -> tuple[nn.Module, Callable[[], Tensor]]:
    """A network, and a forward pass of it to a loss."""
    spec = parse_model_spec(model | changes)
    torch.manual_seed(0)
    network = build(spec, tile_relations=None if spec.operator in ("attention", "bias", "shaw") else 5)
    inputs = torch.randn(2, 1, 16, 16) if model is TINY else torch.randint(11, (2, 6))
    return network, lambda: network(inputs).square().mean()


@pytest.mark.parametrize("model", [TINY, GPT], ids=["vit", "gpt"])
@pytest.mark.parametrize(
    ("operator", "checkpointing"),
    [*((operator, "none") for operator in OPERATORS), ("translution", "block"), ("translution", "offload")],
)
def test_a_healthy_network_is_finite_and_a_bad_weight_is_found(
    operator: str, model: dict[str, Any], checkpointing: str
) -> None:
    network, forward = network_of(model, operator=operator, checkpointing=checkpointing)
    assert first_nonfinite_value(network, forward) is None
    # One parameter of each kind: names of tiles differ only in a number.
    kinds = {re.sub(r"\d+", "", name): name for name, _ in network.named_parameters() if "blocks.1" in name}
    for name in kinds.values():
        parameter = network.get_parameter(name)
        with torch.no_grad():
            before, parameter.view(-1)[-1] = parameter.view(-1)[-1].clone(), torch.nan
        assert first_nonfinite_value(network, forward) == f"{name} (parameter)"
        with torch.no_grad():
            parameter.view(-1)[-1] = before
    assert first_nonfinite_value(network, forward) is None


def test_the_layer_that_overflows_is_named() -> None:
    network, forward = network_of(TINY)
    with torch.no_grad():
        network.get_parameter("blocks.1.ffn.up.weight").fill_(1e38)
    assert first_nonfinite_value(network, forward) == "blocks.1.ffn.up (output)"


class Between(nn.Module):
    """Overflows between two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(2, 2), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.two(self.one(x) * 1e38 * 1e38)
        return result


def test_an_overflow_between_layers_is_an_input_of_the_next_layer() -> None:
    network, x = Between(), torch.ones(3, 2)
    assert first_nonfinite_value(network, lambda: network(x).sum()) == "two (input)"
    assert first_nonfinite_value(network.one, lambda: network.one(x).sum()) is None
    assert first_nonfinite_value(network.one, lambda: network.one(x).sum() * torch.inf) == "loss"
    assert first_nonfinite_value(network, lambda: network(x * torch.nan).sum()) == "network (input)"
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())


def test_the_first_nonfinite_gradient_in_backward_is_named() -> None:
    network, forward = network_of(TINY)
    forward().backward()

    def gradient(parameter: nn.Parameter) -> Tensor | None:
        return parameter.grad

    assert first_nonfinite_gradient(network, gradient) is None
    for name in ("embedding.projection.weight", "blocks.0.ffn.up.bias"):
        grad = network.get_parameter(name).grad
        assert grad is not None
        grad.view(-1)[0] = torch.inf
        assert first_nonfinite_gradient(network, gradient) == name


def test_the_norms_that_deepspeed_returns_for_nonfinite_gradients_are_recognized() -> None:
    assert [is_finite_norm(norm) for norm in (None, 0.0, 2.5)] == [True] * 3
    assert [is_finite_norm(norm) for norm in (torch.inf, torch.nan, -1.0)] == [False] * 3


def test_a_skipped_step_ends_a_run_unless_the_loss_is_scaled() -> None:
    plain = SkippedSteps(scaled=False)
    assert not plain.is_diverged(finite=True, scale=1.0)
    assert plain.is_diverged(finite=False, scale=1.0)
    assert plain.describe(1.0) == "the norm of the gradients is not finite"

    scaled = SkippedSteps(scaled=True)
    assert not any(scaled.is_diverged(finite=False, scale=2.0**15) for _ in range(MAX_SKIPPED_STEPS - 1))
    assert not scaled.is_diverged(finite=True, scale=2.0**15)
    assert not any(scaled.is_diverged(finite=False, scale=2.0**15) for _ in range(MAX_SKIPPED_STEPS - 1))
    assert scaled.is_diverged(finite=False, scale=2.0**15)
    assert f"in {MAX_SKIPPED_STEPS} steps in a row, at a loss scale of 32768" in scaled.describe(2.0**15)
    assert SkippedSteps(scaled=True).is_diverged(finite=False, scale=1.0)
