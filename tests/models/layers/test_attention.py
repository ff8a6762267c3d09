"""The baselines against slow references: scalar bias, relative vectors, absolute matrices, rotary embedding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import pytest
import torch
from helpers.chance import examples
from helpers.operator_pairs import LAYOUTS, naive_term_attention
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor, nn

from translution.models import AbsoluteTranslution, BiasAttention, SelfAttention, ShawAttention
from translution.planner.common.errors import InputError

Kind: TypeAlias = "type[SelfAttention | BiasAttention | ShawAttention | AbsoluteTranslution]"
KINDS: list[tuple[Kind, dict[str, Any]]] = [
    (SelfAttention, {}),
    (SelfAttention, {"rotary": True}),
    (SelfAttention, {"kv_heads": 1}),
    (SelfAttention, {"kv_heads": 1, "rotary": True}),
    (BiasAttention, {}),
    (ShawAttention, {}),
    (AbsoluteTranslution, {"roles": "qkv", "tile_relations": 2}),
    (AbsoluteTranslution, {"roles": "kv"}),
    (AbsoluteTranslution, {"roles": "q", "tile_relations": 1}),
]
NAMES = ["plain", "rotary", "shared", "shared-rotary", "bias", "shaw", "absolute-qkv", "absolute-kv", "absolute-q"]
WINDOWED = (BiasAttention, ShawAttention)


def slow(layer: Any, x: Tensor, padding: Tensor | None = None, noise: Tensor | None = None) -> Tensor:
    """Expected output of the layer, computed one pair or position at a time from its parameters."""
    terms: dict[str, Tensor] = {}
    if isinstance(layer, AbsoluteTranslution):
        rows = [absolute_rows(layer, role, x) for role in "qkv"]
    else:
        joint = x @ layer.projections.weight.t()
        shared = (joint.shape[-1] - layer.inner_dim) // 2
        rows = list(joint.split([layer.inner_dim, shared, shared], dim=-1))
    if isinstance(layer, BiasAttention):
        terms["bias"] = layer.chain.logit_tiles[0].table
    if isinstance(layer, ShawAttention):
        terms["key_vectors"] = layer.chain.logit_tiles[0].vectors
        terms["value_vectors"] = layer.chain.value_tiles[0].vectors
    if isinstance(layer, SelfAttention) and layer.rotary is not None:
        rows[:2] = [rotated(layer, row) for row in rows[:2]]
    if isinstance(layer, SelfAttention):
        rows = [for_every_head(layer, row) for row in rows]
    out = naive_term_attention(layer.geometry, layer.heads, rows, **terms, key_padding=padding, noise=noise)
    result: Tensor = layer.output(out)
    return result


def absolute_rows(layer: AbsoluteTranslution, role: str, x: Tensor) -> Tensor:
    if role not in layer.roles:
        plain: Tensor = layer.plain[role](x)
        return plain
    matrices = torch.cat(list(layer.tables[role].parameters()))
    return torch.stack([x[:, n] @ matrices[n] for n in range(x.shape[1])], 1)


def rotated(layer: SelfAttention, rows: Tensor) -> Tensor:
    """Rotate each pair of values as a complex number."""
    assert layer.rotary is not None
    wide = torch.float64 if rows.dtype == torch.float64 else torch.float32  # torch has no half-width complex dtype.
    angle = torch.complex(layer.rotary.cosine.to(wide), layer.rotary.sine.to(wide))
    heads = rows.to(wide).unflatten(2, (-1, layer.head_dim)).movedim(1, 2)
    number = torch.view_as_complex(heads.unflatten(3, (-1, 2)).contiguous()) * angle
    return torch.view_as_real(number).flatten(3).movedim(2, 1).flatten(2).to(rows.dtype)


def for_every_head(layer: SelfAttention, rows: Tensor) -> Tensor:
    """Give each head of queries the keys or values that it shares with its neighbours."""
    heads = rows.shape[-1] // layer.head_dim
    own = [head * heads // layer.heads for head in range(layer.heads)]
    return torch.cat([rows[..., n * layer.head_dim : (n + 1) * layer.head_dim] for n in own], -1)


def results(call: Callable[..., Tensor], layer: nn.Module, x: Tensor, grad: Tensor, *more: Any) -> list[Tensor]:
    out = call(x, *more)
    return [out, *torch.autograd.grad(out, [x, *layer.parameters()], grad)]


def make(kind: Kind, options: dict[str, Any], layout: dict[str, Any], **more: Any) -> nn.Module:
    torch.manual_seed(0)
    layout = {key: value for key, value in layout.items() if key != "window" or kind in WINDOWED}
    layer = kind(6, 2, head_dim=8, **options, **layout, **more)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.5)
    return layer


@pytest.mark.usefixtures("double", "poisoned")
@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize(
    ("kind", "options", "workspace"),
    # Only the vectors of relations are read in chunks that fit the workspace.
    [*((kind, options, 2**28) for kind, options in KINDS), (ShawAttention, {}, 1)],
    ids=[*NAMES, "shaw-cramped"],
)
def test_a_baseline_equals_its_reference(
    kind: Kind, options: dict[str, Any], layout: dict[str, Any], workspace: int, padded: bool
) -> None:
    layer = make(kind, options, layout, workspace_bytes=workspace)
    tokens: int = layer.geometry.tokens  # type: ignore[union-attr, assignment]
    x, grad = torch.randn(3, tokens, 6, requires_grad=True), torch.randn(3, tokens, 6)
    mask = None
    if padded:
        mask = torch.zeros(3, tokens, dtype=torch.bool)
        mask[0, -1] = True
        mask[1, tokens // 2 :] = True
        mask[:, 0] = False  # The fused kernel does not define the output of a query without any key.
        if tokens > 1 and kind in WINDOWED:
            mask[2, 0] = True
    ours = results(layer, layer, x, grad, mask)
    reference = results(lambda x: slow(layer, x, mask), layer, x, grad)
    for one, other in zip(ours, reference, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10)


@pytest.mark.usefixtures("double", "poisoned")
@pytest.mark.parametrize(
    ("layout", "dropout"),
    [
        ({"length": 3, "causal": True}, 0.0),
        ({"length": 3, "causal": True}, 0.3),
        ({"grid": (2, 2), "class_token": True}, 0.3),
    ],
    ids=str,
)
@pytest.mark.parametrize(("kind", "options"), KINDS, ids=NAMES)
def test_gradcheck_of_a_baseline(kind: Kind, options: dict[str, Any], layout: dict[str, Any], dropout: float) -> None:
    torch.manual_seed(0)
    layer = kind(2, 1, head_dim=4, dropout=dropout, **options, **layout)
    names = [name for name, _ in layer.named_parameters()]
    weights = [torch.randn_like(parameter, requires_grad=True) for parameter in layer.parameters()]

    def call(x: Tensor, *values: Tensor) -> Tensor:
        torch.manual_seed(7)  # Every call drops the same weights.
        result: Tensor = torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))
        return result

    x = torch.randn(2, layer.geometry.tokens, 2, requires_grad=True)
    assert torch.autograd.gradcheck(call, (x, *weights))


@pytest.mark.usefixtures("double", "poisoned")
@pytest.mark.parametrize("frozen", ["tiles", "x", "projections", "all but x", "all but tiles"])
@pytest.mark.parametrize("kind", [BiasAttention, ShawAttention])
def test_any_subset_of_a_baselines_gradients(kind: Kind, frozen: str) -> None:
    layer = make(kind, {}, {"grid": (2, 3), "class_token": True})
    for name, parameter in layer.named_parameters():
        trained = {"all but x": False, "all but tiles": "tiles" in name}
        parameter.requires_grad_(trained.get(frozen, frozen not in name))
    x = torch.randn(2, 7, 6, requires_grad=frozen not in ("x", "all but tiles"))
    wanted = [tensor for tensor in (x, *layer.parameters()) if tensor.requires_grad]
    found = [torch.autograd.grad(out, wanted, torch.ones_like(out)) for out in (layer(x), slow(layer, x))]
    for ours, reference in zip(*found, strict=True):
        torch.testing.assert_close(ours, reference, rtol=0, atol=1e-10)


@examples(60)
@given(
    kind=st.sampled_from(KINDS),
    layout=st.sampled_from(LAYOUTS),
    heads=st.integers(1, 3),
    head_dim=st.sampled_from([4, 8]),
    dim=st.integers(1, 7),
    batch=st.integers(1, 3),
    workspace=st.sampled_from([1, 500, 2**20]),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
)
def test_any_baseline_is_as_exact_as_its_reference(
    kind: tuple[Kind, dict[str, Any]],
    layout: dict[str, Any],
    heads: int,
    head_dim: int,
    dim: int,
    batch: int,
    workspace: int,
    dtype: torch.dtype,
) -> None:
    """The error against float64 is at most twice the reference's error plus a few roundings."""
    torch.manual_seed(0)
    made, options = kind
    assume(not options.get("rotary") or head_dim >= 2 * len(layout.get("grid", (0,))))  # Two columns for each axis.
    layout = {key: value for key, value in layout.items() if key != "window" or made in WINDOWED}
    arguments: dict[str, Any] = {"head_dim": head_dim, "workspace_bytes": workspace, **options, **layout}
    layer, exact = made(dim, heads, **arguments).to(dtype), made(dim, heads, **arguments).double()
    exact.load_state_dict(layer.state_dict())
    x = torch.randn(batch, layer.geometry.tokens, dim).to(dtype)
    found = []
    for call, of in ((layer, layer), (lambda x: slow(layer, x), layer), (lambda x: slow(exact, x), exact)):
        own = x.to(next(of.parameters()).dtype).requires_grad_()
        found.append([value.detach().double() for value in results(call, of, own, torch.ones_like(own))])
    for ours, reference, truth in zip(*found, strict=True):
        floor = 16 * torch.finfo(dtype).eps * (float(truth.abs().max()) + 1)
        assert (ours - truth).abs().max() <= 2 * (reference - truth).abs().max() + floor


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("kind", [BiasAttention, ShawAttention])
@pytest.mark.parametrize("layout", LAYOUTS[:7], ids=str)
def test_a_baseline_without_its_terms_is_self_attention(kind: Kind, layout: dict[str, Any]) -> None:
    layer, plain = make(kind, {}, layout), make(SelfAttention, {}, layout)
    for name, parameter in layer.named_parameters():
        if "tiles" in name:
            nn.init.zeros_(parameter)
    plain.load_state_dict({name: value for name, value in layer.state_dict().items() if "chain" not in name})
    x = torch.randn(2, layer.geometry.tokens, 6)  # type: ignore[union-attr, arg-type]
    torch.testing.assert_close(layer(x), plain(x), rtol=0, atol=1e-12)


@pytest.mark.usefixtures("double")
def test_absolute_matrices_that_are_equal_are_self_attention() -> None:
    absolute = make(AbsoluteTranslution, {"tile_relations": 2}, {"length": 5})
    plain = make(SelfAttention, {}, {"length": 5})
    state = plain.state_dict()
    for role, matrix in zip("qkv", state["projections.weight"].chunk(3), strict=True):
        for tile in absolute.tables[role]:  # type: ignore[union-attr, index]
            tile.weight.data.copy_(matrix.t().expand_as(tile.weight))
    absolute.output.load_state_dict(plain.output.state_dict())  # type: ignore[union-attr]
    x = torch.randn(2, 5, 6)
    torch.testing.assert_close(absolute(x), plain(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("kind", "options"), KINDS, ids=NAMES)
def test_a_baselines_state_dict_loads_and_autocast_keeps_gradients_in_float32(
    kind: Kind, options: dict[str, Any]
) -> None:
    layer = make(kind, options, {"grid": (2, 3), "class_token": True})
    other = kind(6, 2, head_dim=8, **options, grid=(2, 3), class_token=True)
    other.load_state_dict(layer.state_dict())
    x = torch.randn(2, 7, 6, requires_grad=True)
    assert torch.equal(layer(x), other(x))
    exact = results(layer, layer, x, torch.ones(2, 7, 6))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = layer(x)
    assert out.dtype == torch.bfloat16
    found = torch.autograd.grad(out, [x, *layer.parameters()], torch.ones_like(out))
    for near, true in zip(found, exact[1:], strict=True):
        assert near.dtype == torch.float32
        assert (near - true).abs().max() <= 0.05 * true.abs().max() + 1e-2


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (SelfAttention, {"window": 1}, "window: 1 is not allowed: must be None for self-attention"),
        (AbsoluteTranslution, {"window": 1}, "window: 1 is not allowed: must be None for absolute matrices"),
        (AbsoluteTranslution, {"roles": "x"}, "roles: 'x'"),
        (AbsoluteTranslution, {"tile_relations": 0}, "tile_relations: 0"),
        (SelfAttention, {"rotary": True, "head_dim": 3}, "head_dim: 3 is not allowed: must be a multiple of 2"),
        (ShawAttention, {"dropout": 1.0}, "dropout: 1.0 is not allowed: must be at least 0 and below 1"),
        (BiasAttention, {"workspace_bytes": 0}, "workspace_bytes: 0"),
    ],
)
def test_an_error_names_the_wrong_argument_of_a_baseline(kind: Kind, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        kind(6, 2, length=4, **options)
