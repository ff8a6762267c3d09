"""Dropout of attention weights: drawn again in backward instead of saved, the same for the same seed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.operator_pairs import LAYERS, ROLES, layer_pair, outputs
from torch import Tensor, nn

from translution.models import AbsoluteTranslution, AlphaTranslution, BiasAttention, SelfAttention, Translution
from translution.models.ops.context import dropout_noise

LAYOUT: dict[str, Any] = {"grid": (2, 3), "class_token": True}
KINDS: list[tuple[type[Any], dict[str, Any]]] = [
    (Translution, {"tile_relations": 4}),
    (AlphaTranslution, {"c1": 2, "c2": 3}),
    (BiasAttention, {}),
    (SelfAttention, {}),
    (AbsoluteTranslution, {}),
]


@pytest.mark.usefixtures("double", "poisoned")
@pytest.mark.parametrize("roles", ROLES)
@pytest.mark.parametrize("layout", [LAYOUT, {"length": 7, "causal": True}], ids=str)
@pytest.mark.parametrize(("layer", "options"), LAYERS[:2], ids=["full", "alpha"])
def test_the_grouped_and_the_gathered_operator_drop_the_same_weights_for_the_same_seed(
    layer: type[Any], options: dict[str, Any], layout: dict[str, Any], roles: str
) -> None:
    fast, slow = layer_pair(layer, {**options, **layout, "roles": roles, "dropout": 0.4}, tile_relations=3)
    x, grad = (torch.randn(3, fast.geometry.tokens, 6, requires_grad=needs) for needs in (True, False))
    found = []
    for chosen in (fast, slow):
        torch.manual_seed(3)
        found.append(outputs(chosen, x, grad))
    for ours, reference in zip(*found, strict=True):
        torch.testing.assert_close(ours, reference, rtol=0, atol=1e-10)
    torch.manual_seed(4)
    assert not torch.allclose(fast(x), found[0][0])


@pytest.mark.usefixtures("double", "poisoned")
@pytest.mark.parametrize(("layer", "options"), KINDS[:2], ids=["full", "alpha"])
def test_gradcheck_under_dropout(layer: type[Any], options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    ours = layer(2, 1, head_dim=2, grid=(1, 3), dropout=0.3, **options)
    names = [name for name, _ in ours.named_parameters()]
    weights = [torch.randn_like(parameter, requires_grad=True) for parameter in ours.parameters()]

    def call(x: Tensor, *values: Tensor) -> Tensor:
        torch.manual_seed(7)
        result: Tensor = torch.func.functional_call(ours, dict(zip(names, values, strict=True)), (x,))
        return result

    assert torch.autograd.gradcheck(call, (torch.randn(2, 3, 2, requires_grad=True), *weights))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_noise_is_zero_with_the_given_probability_and_preserves_the_mean(dtype: torch.dtype) -> None:
    noise = dropout_noise(torch.empty(200, 500, dtype=dtype), 0.3, 5)
    assert noise.dtype == dtype
    # 100,000 draws: the standard deviation of the mean is 0.0014.
    assert float((noise == 0).double().mean()) == pytest.approx(0.3, abs=0.008)
    assert noise.unique().tolist() == [0.0, float(torch.tensor(1 / 0.7, dtype=dtype))]
    assert torch.equal(noise, dropout_noise(noise, 0.3, 5))
    assert not torch.equal(noise, dropout_noise(noise, 0.3, 6))


@pytest.mark.slow
@pytest.mark.usefixtures("double")
@pytest.mark.parametrize(("layer", "options"), KINDS, ids=lambda value: getattr(value, "__name__", ""))
def test_evaluation_drops_nothing_and_the_mean_over_seeds_is_the_undropped_output(
    layer: type[Any], options: dict[str, Any]
) -> None:
    torch.manual_seed(0)
    ours, plain = layer(6, 2, **LAYOUT, dropout=0.5, **options), layer(6, 2, **LAYOUT, **options)
    plain.load_state_dict(ours.state_dict())
    x = torch.randn(1, 7, 6)
    with torch.no_grad():
        expected = plain(x)
        assert torch.equal(ours.eval()(x), plain.eval()(x))
        ours.train()
        # Each sample of a batch has a mask of its own.
        drawn = torch.cat([ours(x.expand(100, 7, 6)) for _ in range(15)])
    assert drawn.std(0).min() > 0
    error = (drawn.mean(0) - expected[0]).abs() / (drawn.std(0) / 1500**0.5)
    assert error.max() < 5  # In standard errors, maximum over 42 values.


def test_dropout_does_not_add_to_what_is_saved_for_backward() -> None:
    sizes = []
    for dropout in (0.0, 0.3):
        layer = Translution(8, 2, **LAYOUT, dropout=dropout)
        saved: dict[int, int] = {}

        def pack(tensor: Tensor, saved: dict[int, int] = saved) -> Tensor:
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        x = torch.randn(3, 7, 8, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            layer.tables({"query": x, "key": x, "value": x})
        sizes.append(sum(saved.values()))
    assert sizes[0] == sizes[1] == (3 * 7 * 8 + 3 * 2 * 7 * 7) * 4


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize(("layer", "options"), KINDS[:3], ids=["full", "alpha", "bias"])
def test_activation_checkpointing_drops_the_same_weights_again(
    layer: type[Any], options: dict[str, Any], reentrant: bool
) -> None:
    torch.manual_seed(0)
    ours = layer(6, 2, **LAYOUT, dropout=0.4, **options)
    x, grad = torch.randn(2, 7, 6, requires_grad=True), torch.randn(2, 7, 6)
    torch.manual_seed(1)
    plain = outputs(ours, x, grad)
    torch.manual_seed(1)
    out = torch.utils.checkpoint.checkpoint(ours, x, use_reentrant=reentrant)
    out.backward(grad)
    for found, reference in zip([out, x.grad, *(p.grad for p in ours.parameters())], plain, strict=True):
        torch.testing.assert_close(found, reference, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("layer", "options"), KINDS, ids=lambda value: getattr(value, "__name__", ""))
def test_a_network_with_dropout_can_be_compiled(layer: type[Any], options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(6, 6), layer(6, 2, **LAYOUT, dropout=0.2, **options), nn.GELU())
    x = torch.randn(3, 7, 6)
    compiled = torch.compile(network, backend="aot_eager")
    found = []
    for model in (network, compiled):
        torch.manual_seed(2)
        network.zero_grad()
        out = model(x)
        out.square().sum().backward()
        found.append([out, *(parameter.grad for parameter in network.parameters())])
    for ours, reference in zip(*found, strict=True):
        torch.testing.assert_close(ours, reference)
