"""Masks, dtypes, autocast, compilation, checkpointing, and wrong arguments of the layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.operator_pairs import LAYERS, layer_pair, outputs
from torch import Tensor, nn

from translution.models import AlphaTranslution, SelfAttention, Translution
from translution.models.ops.rotary import rotary_angles
from translution.planner.common.errors import InputError
from translution.planner.config.geometry import RelationGeometry


@pytest.mark.usefixtures("double", "poisoned")
@pytest.mark.parametrize("roles", ["qkv", "kv", "v"])
@pytest.mark.parametrize(
    "layout", [{"length": 5}, {"length": 6, "causal": True}, {"grid": (2, 3), "window": 1}], ids=str
)
@pytest.mark.parametrize(("layer", "options"), LAYERS[:2], ids=["full", "alpha"])
def test_no_query_attends_to_padding(
    layer: type[Any], options: dict[str, Any], layout: dict[str, Any], roles: str
) -> None:
    fast, slow = layer_pair(layer, {**options, **layout, "roles": roles}, tile_relations=3)
    tokens = fast.geometry.tokens
    mask = torch.zeros(3, tokens, dtype=torch.bool)
    mask[0, -2:] = True
    mask[1, 0] = True  # The first token of a causal sequence then attends to nothing.
    x, grad = torch.randn(3, tokens, 6, requires_grad=True), torch.randn(3, tokens, 6)
    results = []
    for chosen in (fast, slow):
        out = chosen(x, key_padding_mask=mask)
        results.append([out, *torch.autograd.grad(out, [x, *chosen.parameters()], grad)])
    for ours, reference in zip(*results, strict=True):
        torch.testing.assert_close(ours, reference, rtol=0, atol=1e-10)
    changed = x.detach().clone()
    changed[0, -2:] += 1
    unpadded = fast(changed, key_padding_mask=mask)[0, :-2]
    torch.testing.assert_close(unpadded, results[0][0][0, :-2].detach(), rtol=0, atol=1e-12)


def test_attention_supports_the_same_mask() -> None:
    torch.manual_seed(0)
    layer, x = SelfAttention(6, 2, length=5, causal=True), torch.randn(2, 5, 6)
    mask = torch.tensor([[False] * 5, [False, False, True, False, False]])
    other = x.clone()
    other[1, 2] += 1
    unpadded = [0, 1, 3, 4]
    torch.testing.assert_close(layer(x, mask)[1, unpadded], layer(other, mask)[1, unpadded])
    torch.testing.assert_close(layer(x, mask)[0], layer(x)[0])


def test_an_error_names_a_wrong_mask() -> None:
    with pytest.raises(InputError, match=r"key_padding_mask: torch.float32 \(2, 4\) is not allowed: must be bool"):
        Translution(6, 2, length=4)(torch.randn(2, 4, 6), torch.zeros(2, 4))


@pytest.mark.filterwarnings("ignore")
def test_the_surrounding_model_can_be_compiled() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Linear(6, 6), Translution(6, 2, grid=(2, 3), tile_relations=4), nn.GELU(), nn.Linear(6, 2)
    )
    compiled = torch.compile(network, backend="aot_eager")
    x = torch.randn(3, 6, 6)
    torch.testing.assert_close(compiled(x), network(x))
    grads = []
    for model in (network, compiled):
        network.zero_grad()
        model(x).square().sum().backward()
        grads.append([parameter.grad for parameter in network.parameters()])
    for ours, reference in zip(*grads, strict=True):
        torch.testing.assert_close(ours, reference)


def test_bfloat16_is_as_close_to_float64_as_its_reference() -> None:
    torch.manual_seed(0)
    exact = Translution(16, 2, grid=(3, 4), class_token=True).double()
    x = torch.randn(2, 13, 16, dtype=torch.float64)
    fast = Translution(16, 2, grid=(3, 4), class_token=True).bfloat16()
    slow = Translution(16, 2, grid=(3, 4), class_token=True, implementation="gather").bfloat16()
    for layer in (fast, slow):
        layer.load_state_dict(exact.state_dict())
    truth = exact(x)
    floor = 1e-3
    error, reference = ((layer(x.bfloat16()).double() - truth).abs().max() for layer in (fast, slow))
    assert error <= reference + floor


@pytest.mark.parametrize("implementation", ["grouped", "gather"])
@pytest.mark.parametrize("roles", ["qkv", "kv", "q", "v"])
@pytest.mark.parametrize("layer", [Translution, AlphaTranslution])
def test_autocast_computes_in_bfloat16_and_keeps_gradients_in_float32(
    layer: type[Any], roles: str, implementation: str
) -> None:
    torch.manual_seed(0)
    options: dict[str, Any] = {"roles": roles, "workspace_bytes": 3000, "implementation": implementation}
    ours = layer(16, 2, grid=(3, 4), class_token=True, **options)
    x = torch.randn(2, 13, 16, requires_grad=True)
    exact = outputs(ours, x, torch.ones(2, 13, 16))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = ours(x)
    assert out.dtype == torch.bfloat16
    found = [out, *torch.autograd.grad(out, [x, *ours.parameters()], torch.ones_like(out))]
    for near, true in zip(found[1:], exact[1:], strict=True):
        assert near.dtype == torch.float32
        # bf16 has 8 significant bits: the error is a few hundredths of the largest value.
        assert (near - true).abs().max() <= 0.05 * true.abs().max() + 1e-3


def test_rotary_angles_do_not_depend_on_deepspeeds_patched_constructors() -> None:
    """Inside deepspeed.zero.Init new floating-point tensors have the model's dtype."""
    true = torch.outer(torch.arange(1024).double(), 10000.0 ** (-torch.arange(0, 64, 2).double() / 64))
    patched = {name: getattr(torch, name) for name in ("arange", "zeros", "ones", "empty", "full", "tensor")}

    def low(function: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Tensor:
            made: Tensor = function(*arguments, **options)
            return made.bfloat16() if made.is_floating_point() else made

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name, function in patched.items():
            patch.setattr(torch, name, low(function))
        angles = rotary_angles(RelationGeometry.sequence(1024), 64)
        grid = rotary_angles(RelationGeometry.grid(5, 7, class_token=True), 16)
    torch.testing.assert_close(angles, true, rtol=0, atol=1e-9)
    assert grid.dtype == torch.float64
    assert grid.shape == (36, 8)
    assert not grid[0].any()


def test_one_head_of_full_width_needs_no_output_projection() -> None:
    layer = Translution(6, 1, grid=(2, 2))
    assert isinstance(layer.output, nn.Identity)
    assert layer(torch.randn(2, 4, 6)).shape == (2, 4, 6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"grid": (2, 2), "length": 4}, "grid: .* give exactly one"),
        ({}, "grid: None"),
        ({"grid": (2, 2), "window": (1,)}, r"window: \(1,\)"),
        ({"length": 4, "class_token": True}, "class_token: True"),
        ({"length": 4, "heads": 4}, "heads: 4 is not allowed: must divide dim 6"),
        ({"length": 4, "roles": "qx"}, "roles: 'qx'"),
        ({"length": 0}, "length: 0"),
        ({"length": 4, "tile_relations": 0}, "tile_relations: 0"),
        ({"length": 4, "implementation": "fast"}, "implementation: 'fast'"),
        ({"length": 4, "workspace_bytes": 0}, "workspace_bytes: 0"),
    ],
)
def test_an_error_names_the_wrong_argument(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Translution(6, arguments.pop("heads", 2), **arguments)


def test_an_error_names_a_wrong_shape() -> None:
    with pytest.raises(InputError, match=r"x: shape \(1, 5, 6\) is not allowed: must be \(batch, 4, 6\)"):
        Translution(6, 2, length=4)(torch.randn(1, 5, 6))


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_gives_the_same_gradients(reentrant: bool) -> None:
    torch.manual_seed(0)
    layer = Translution(6, 2, grid=(2, 3), tile_relations=4)
    x, grad = torch.randn(2, 6, 6, requires_grad=True), torch.randn(2, 6, 6)
    plain = outputs(layer, x, grad)
    out = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=reentrant)
    for parameter in layer.parameters():
        parameter.grad = None
    out.backward(grad)
    found = [out, x.grad, *(parameter.grad for parameter in layer.parameters())]
    for ours, reference in zip(found, plain, strict=True):
        torch.testing.assert_close(ours, reference, rtol=0, atol=0)
