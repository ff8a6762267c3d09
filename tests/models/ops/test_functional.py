"""The layers under the transforms of torch.func, compared with the grouped operator in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.operator_pairs import LAYERS
from torch.func import functional_call, grad, jvp, stack_module_state, vmap

from translution.models import AbsoluteTranslution, BiasAttention, SelfAttention, ShawAttention

pytestmark = [
    pytest.mark.usefixtures("double"),
    # torch has no batched form of its fused attention on CPUs, and says so.
    pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning"),
]
CASES: list[tuple[type[Any], dict[str, Any]]] = [
    *LAYERS,
    (LAYERS[0][0], {"roles": "kv", "tile_relations": 4}),
    (LAYERS[0][0], {"roles": "v"}),
    (LAYERS[1][0], {"c1": 2, "c2": 3, "roles": "q"}),
    *((layer, {}) for layer in (BiasAttention, ShawAttention, SelfAttention, AbsoluteTranslution)),
]
LAYOUTS: list[dict[str, Any]] = [{"grid": (3, 2), "class_token": True}, {"length": 7, "causal": True}]
every_layer = pytest.mark.parametrize(("layer", "options"), CASES, ids=str)
every_layout = pytest.mark.parametrize("layout", LAYOUTS, ids=str)


@every_layout
@every_layer
def test_vmap_over_layers_and_over_batches(layer: type[Any], options: dict[str, Any], layout: dict[str, Any]) -> None:
    torch.manual_seed(0)
    members = [layer(6, 2, head_dim=4, **layout, **options) for _ in range(3)]
    x, padding = torch.randn(2, 4, 7, 6), torch.zeros(4, 7, dtype=torch.bool)
    padding[1, 5:] = True
    expected = torch.stack([torch.stack([member(part, padding) for part in x]) for member in members])
    parameters, buffers = stack_module_state(members)

    def call(parameters: Any, buffers: Any, part: torch.Tensor) -> torch.Tensor:
        return functional_call(members[0], (parameters, buffers), (part, padding))

    both = vmap(vmap(call, in_dims=(None, None, 0)), in_dims=(0, 0, None))(parameters, buffers, x)
    torch.testing.assert_close(both, expected, rtol=0, atol=1e-12)


@every_layout
@every_layer
def test_gradients_of_each_sample(layer: type[Any], options: dict[str, Any], layout: dict[str, Any]) -> None:
    torch.manual_seed(0)
    made, x = layer(6, 2, head_dim=4, **layout, **options), torch.randn(3, 7, 6)

    def loss(parameters: Any, sample: torch.Tensor) -> torch.Tensor:
        return functional_call(made, parameters, (sample[None],)).square().sum()

    found = vmap(grad(loss), in_dims=(None, 0))(dict(made.named_parameters()), x)
    for number, sample in enumerate(x):
        names, parameters = zip(*made.named_parameters(), strict=True)
        expected = torch.autograd.grad(made(sample[None]).square().sum(), parameters)
        for name, value in zip(names, expected, strict=True):
            torch.testing.assert_close(found[name][number], value, rtol=0, atol=1e-10)


def test_a_directional_derivative_with_a_window() -> None:
    torch.manual_seed(0)
    layer = LAYERS[0][0](6, 2, grid=(3, 4), window=1)
    x, step = torch.randn(2, 12, 6), torch.randn(2, 12, 6)
    _, change = jvp(layer, (x,), (step,))
    torch.testing.assert_close(change, (layer(x + 1e-6 * step) - layer(x - 1e-6 * step)) / 2e-6, rtol=0, atol=1e-7)


def test_dropout_needs_the_randomness_that_vmap_is_told() -> None:
    torch.manual_seed(0)
    layer, x = LAYERS[0][0](6, 2, length=5, dropout=0.5), torch.randn(1, 5, 6).expand(2, 2, 5, 6)
    with pytest.raises(RuntimeError, match="randomness"):
        vmap(layer)(x)
    first, second = vmap(layer, randomness="different")(x)
    assert not torch.equal(first, second)
    first, second = vmap(layer.eval())(x)
    torch.testing.assert_close(first, second)
