"""The grouped operators against the gathered reference, and the paper's two special cases."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from translution.models import AlphaTranslution, SelfAttention, Translution
from translution.models.rotary import rotary_angles
from translution.models.tiles import RelationTables
from translution.planner.errors import InputError
from translution.planner.relations import RelationGeometry

PLACES: list[dict[str, Any]] = [
    {"length": 1},
    {"length": 5},
    {"length": 7, "causal": True},
    {"grid": (3, 4)},
    {"grid": (1, 3)},
    {"grid": (2, 3), "class_token": True},
    {"grid": (3, 1), "class_token": True},
    {"length": 6, "window": 2},
    {"length": 6, "causal": True, "window": 2},
    {"grid": (3, 4), "class_token": True, "window": 1},
]
WINDOWS = st.one_of(st.none(), st.integers(0, 4))
ROLES = ("qkv", "kv", "qv", "qk", "q", "k", "v")
LAYERS: list[tuple[type[Any], dict[str, Any]]] = [
    (Translution, {}),
    (AlphaTranslution, {"c1": 2, "c2": 3}),
    (AlphaTranslution, {"c1": 3, "c2": 1, "rotary": True}),
]


def layer_pair(layer: type[Any], options: dict[str, Any], **grouped: Any) -> tuple[nn.Module, nn.Module]:
    """A grouped layer and its gathered twin with the same weights, large enough to matter."""
    torch.manual_seed(0)
    fast = layer(6, 2, head_dim=4, **options, **grouped)
    for parameter in fast.parameters():
        nn.init.normal_(parameter, std=0.5)
    tables = {"tile_relations": grouped.get("tile_relations")}
    slow = layer(6, 2, head_dim=4, **options, **tables, implementation="gather")
    slow.load_state_dict(fast.state_dict())
    return fast, slow


def outputs(layer: nn.Module, x: Tensor, grad: Tensor) -> list[Tensor]:
    """The layer's output, and the gradients of its input and of every weight."""
    out = layer(x)
    return [out, *torch.autograd.grad(out, [x, *layer.parameters()], grad)]


@pytest.mark.usefixtures("double", "poisoned")
@pytest.mark.parametrize("tiling", [(None, 2**28), (1, 1), (3, 700)], ids=["whole", "single-rows", "pieces"])
@pytest.mark.parametrize("roles", ROLES)
@pytest.mark.parametrize("place", PLACES, ids=str)
@pytest.mark.parametrize(("layer", "options"), LAYERS, ids=["full", "alpha", "alpha-rotary"])
def test_grouped_equals_gathered(
    layer: type[Any], options: dict[str, Any], place: dict[str, Any], roles: str, tiling: tuple[int | None, int]
) -> None:
    tile, workspace = tiling
    options = {**options, **place, "roles": roles}
    fast, slow = layer_pair(layer, options, tile_relations=tile, workspace_bytes=workspace)
    tokens = fast.geometry.tokens
    x, grad = torch.randn(3, tokens, 6, requires_grad=True), torch.randn(3, tokens, 6)
    for ours, reference in zip(outputs(fast, x, grad), outputs(slow, x, grad), strict=True):
        torch.testing.assert_close(ours, reference, rtol=0, atol=1e-10)


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("place", PLACES, ids=str)
def test_the_reference_is_the_definition_pair_by_pair(place: dict[str, Any]) -> None:
    """The gathered operator itself, against loops that follow the paper's equations one by one."""
    torch.manual_seed(0)
    layer = Translution(4, 2, **place, implementation="gather")
    geometry, tables = layer.geometry, layer.tables
    wq, wk, wv = (torch.randn(geometry.relations, 4, 4) for _ in range(3))
    for role, table in (("query", wq), ("key", wk), ("value", wv)):
        tables.load_table(role, table)
    x = torch.randn(2, geometry.tokens, 4)
    expected = torch.zeros(2, geometry.tokens, 4)
    for b in range(2):
        for h in (slice(0, 2), slice(2, 4)):
            for i in range(geometry.tokens):
                keys = [j for j in range(geometry.tokens) if geometry.relation(i, j) is not None]
                logits, values = [], []
                for j in keys:
                    r = geometry.relation(i, j)
                    assert r is not None
                    query, key = x[b, i] @ wq[geometry.reverse(r)], x[b, j] @ wk[r]
                    logits.append((query[h] @ key[h]) / 2**0.5)
                    values.append((x[b, j] @ wv[r])[h])
                weights = torch.stack(logits).softmax(0)
                expected[b, i, h] = (weights[:, None] * torch.stack(values)).sum(0)
    torch.testing.assert_close(layer(x), layer.output(expected), rtol=0, atol=1e-12)


@pytest.mark.usefixtures("double", "poisoned")
@pytest.mark.parametrize("place", [{"length": 3, "causal": True}, {"grid": (2, 2), "class_token": True}], ids=str)
@pytest.mark.parametrize("roles", ["qkv", "k", "v"])
def test_gradcheck(place: dict[str, Any], roles: str) -> None:
    torch.manual_seed(0)
    layer = Translution(2, 1, head_dim=3, roles=roles, tile_relations=2, workspace_bytes=1, **place)
    names = [name for name, _ in layer.named_parameters()]
    weights = [torch.randn_like(parameter, requires_grad=True) for parameter in layer.parameters()]

    def call(x: Tensor, *values: Tensor) -> Tensor:
        result: Tensor = torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))
        return result

    x = torch.randn(2, layer.geometry.tokens, 2, requires_grad=True)
    assert torch.autograd.gradcheck(call, (x, *weights))


@pytest.mark.usefixtures("double", "poisoned")
@pytest.mark.parametrize("frozen", ["query", "key", "value", "x", "all but x", "all but value"])
def test_any_subset_of_gradients(frozen: str) -> None:
    options = {"grid": (2, 3), "class_token": True}
    fast, slow = layer_pair(Translution, options, tile_relations=4)
    x = torch.randn(2, 7, 6, requires_grad=frozen != "x")
    for layer in (fast, slow):
        for name, parameter in layer.named_parameters():
            kept = {"all but x": False, "all but value": name.endswith("value")}
            parameter.requires_grad_(kept.get(frozen, not name.endswith(frozen)))
    if frozen == "all but value":
        x.requires_grad_(False)
    results = []
    for layer in (fast, slow):
        out = layer(x)
        wanted = [t for t in (x, *layer.parameters()) if t.requires_grad]
        results.append(torch.autograd.grad(out, wanted, torch.ones_like(out)))
    for ours, reference in zip(*results, strict=True):
        torch.testing.assert_close(ours, reference, rtol=0, atol=1e-10)


def test_nothing_is_tracked_when_nothing_is_trained() -> None:
    layer = Translution(6, 2, grid=(2, 2)).requires_grad_(False)
    assert not layer(torch.randn(1, 4, 6)).requires_grad
    with torch.no_grad():
        assert not Translution(6, 2, grid=(2, 2))(torch.randn(1, 4, 6)).requires_grad


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("place", [place for place in PLACES if "window" not in place], ids=str)
def test_equal_matrices_make_it_self_attention(place: dict[str, Any]) -> None:
    torch.manual_seed(0)
    ours, attention = Translution(6, 2, tile_relations=3, **place), SelfAttention(6, 2, **place)
    matrices = attention.projections.weight.detach().view(3, 6, 6)
    for role, matrix in zip(("query", "key", "value"), matrices, strict=True):
        ours.tables.load_table(role, matrix.t().expand(ours.geometry.relations, 6, 6))
    ours.output.load_state_dict(attention.output.state_dict())
    x = torch.randn(3, ours.geometry.tokens, 6)
    torch.testing.assert_close(ours(x), attention(x), rtol=0, atol=1e-12)


@pytest.mark.usefixtures("double")
def test_a_window_with_uniform_weights_is_a_convolution() -> None:
    """Relations within one step of a token are a 3×3 kernel; the weights' common factor is 1/9 inside."""
    torch.manual_seed(0)
    geometry = RelationGeometry.grid(5, 6, window=1)
    tables = RelationTables(geometry, 2, 4, 6, roles="v", scale=1.0, tile_relations=4)
    weight = torch.randn(6, 4, 3, 3)
    # Relation r is the offset query − key; conv2d reads its input at key − query.
    tables.load_table("value", weight.flatten(2).flip(2).permute(2, 1, 0))
    image = torch.randn(2, 4, 5, 6)
    constant = torch.ones(2, 30, 4)
    out, _ = tables({"plain_query": constant, "plain_key": constant, "value": image.flatten(2).transpose(1, 2)})
    assert out is not None
    convolved = nn.functional.conv2d(image, weight, padding=1)
    inside = (out.transpose(1, 2).unflatten(2, (5, 6)) * 9)[:, :, 1:-1, 1:-1]
    torch.testing.assert_close(inside, convolved[:, :, 1:-1, 1:-1], rtol=0, atol=1e-12)


@pytest.mark.usefixtures("double", "poisoned")
@pytest.mark.parametrize("roles", ["qkv", "kv", "v"])
@pytest.mark.parametrize(
    "place", [{"length": 5}, {"length": 6, "causal": True}, {"grid": (2, 3), "window": 1}], ids=str
)
@pytest.mark.parametrize(("layer", "options"), LAYERS[:2], ids=["full", "alpha"])
def test_padding_is_seen_by_no_query(
    layer: type[Any], options: dict[str, Any], place: dict[str, Any], roles: str
) -> None:
    fast, slow = layer_pair(layer, {**options, **place, "roles": roles}, tile_relations=3)
    tokens = fast.geometry.tokens
    mask = torch.zeros(3, tokens, dtype=torch.bool)
    mask[0, -2:] = True
    mask[1, 0] = True  # The first token of a causal sequence then sees nothing.
    x, grad = torch.randn(3, tokens, 6, requires_grad=True), torch.randn(3, tokens, 6)
    results = []
    for chosen in (fast, slow):
        out = chosen(x, key_padding_mask=mask)
        results.append([out, *torch.autograd.grad(out, [x, *chosen.parameters()], grad)])
    for ours, reference in zip(*results, strict=True):
        torch.testing.assert_close(ours, reference, rtol=0, atol=1e-10)
    changed = x.detach().clone()
    changed[0, -2:] += 1
    kept = fast(changed, key_padding_mask=mask)[0, :-2]
    torch.testing.assert_close(kept, results[0][0][0, :-2].detach(), rtol=0, atol=1e-12)


def test_attention_takes_the_same_mask() -> None:
    torch.manual_seed(0)
    layer, x = SelfAttention(6, 2, length=5, causal=True), torch.randn(2, 5, 6)
    mask = torch.tensor([[False] * 5, [False, False, True, False, False]])
    other = x.clone()
    other[1, 2] += 1
    kept = [0, 1, 3, 4]
    torch.testing.assert_close(layer(x, mask)[1, kept], layer(other, mask)[1, kept])
    torch.testing.assert_close(layer(x, mask)[0], layer(x)[0])


def test_a_wrong_mask_names_itself() -> None:
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


@pytest.mark.usefixtures("double")
def test_uniform_weights_over_all_offsets_make_it_a_convolution() -> None:
    """With constant queries and keys every token weighs all tokens alike; the value tables are the kernel.

    On an H×W grid the kernel spans (2H−1)×(2W−1) offsets, zero-padding stands for pairs that do not
    exist, and the weights' common factor is 1/(H·W).
    """
    torch.manual_seed(0)
    height, width, kernel = 5, 6, 3
    geometry = RelationGeometry.grid(height, width)
    tables = RelationTables(geometry, 2, 4, 6, roles="v", scale=1.0, tile_relations=7)
    values = torch.zeros(geometry.relations, 4, 6)
    weight = torch.randn(6, 4, kernel, kernel)
    for dy in range(kernel):
        for dx in range(kernel):
            # conv2d reads the input at offset (dy − 1, dx − 1) from the output; a relation is output − input.
            relation = (height - 1 - (dy - 1)) * (2 * width - 1) + width - 1 - (dx - 1)
            values[relation] = weight[:, :, dy, dx].t()
    tables.load_table("value", values)
    image = torch.randn(2, 4, height, width)
    x = image.flatten(2).transpose(1, 2)
    constant = torch.ones(2, height * width, 4)
    out, _ = tables({"plain_query": constant, "plain_key": constant, "value": x})
    assert out is not None
    convolved = nn.functional.conv2d(image, weight, padding=1).flatten(2).transpose(1, 2)
    torch.testing.assert_close(out * (height * width), convolved, rtol=0, atol=1e-12)


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize(
    ("layer", "options"), [*LAYERS, (SelfAttention, {"rotary": True})], ids=["full", "alpha", "alpha-rotary", "rotary"]
)
def test_a_pattern_that_is_moved_moves_its_output_with_it(layer: type[Any], options: dict[str, Any]) -> None:
    """A 2×3 pattern on a 4×5 grid, everything else masked; learned positions break what relations keep."""
    torch.manual_seed(0)
    ours = layer(8, 2, grid=(4, 5), **options)
    pattern, positions = torch.randn(2, 3, 8), torch.randn(20, 8)

    def place(row: int, col: int, *, absolute: bool) -> Tensor:
        canvas, mask = torch.randn(4, 5, 8), torch.ones(4, 5, dtype=torch.bool)
        canvas[row : row + 2, col : col + 3], mask[row : row + 2, col : col + 3] = pattern, False
        x = canvas.flatten(0, 1) + (positions if absolute else 0)
        out: Tensor = ours(x[None], mask.flatten()[None]).view(4, 5, 8)
        return out[row : row + 2, col : col + 3]

    at_home = place(0, 0, absolute=False)
    for row, col in ((2, 0), (1, 2), (0, 1)):
        torch.testing.assert_close(place(row, col, absolute=False), at_home, rtol=0, atol=1e-12)
    assert (place(1, 2, absolute=True) - place(0, 0, absolute=True)).abs().max() > 1e-2


@settings(max_examples=60, deadline=None)
@given(
    place=st.one_of(
        st.builds(lambda n, c, w: {"length": n, "causal": c, "window": w}, st.integers(1, 7), st.booleans(), WINDOWS),
        st.builds(
            lambda h, w, c, r: {"grid": (h, w), "class_token": c, "window": r},
            st.integers(1, 4),
            st.integers(1, 4),
            st.booleans(),
            WINDOWS,
        ),
    ),
    roles=st.sampled_from(ROLES),
    heads=st.integers(1, 3),
    head_dim=st.integers(1, 5),
    dim=st.integers(1, 7),
    batch=st.integers(1, 3),
    tile=st.one_of(st.none(), st.integers(1, 9)),
    workspace=st.sampled_from([1, 500, 2**20]),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    low=st.one_of(st.none(), st.tuples(st.integers(1, 4), st.integers(1, 4))),
)
def test_any_layer_is_as_exact_as_its_reference(
    place: dict[str, Any],
    roles: str,
    heads: int,
    head_dim: int,
    dim: int,
    batch: int,
    tile: int | None,
    workspace: int,
    dtype: torch.dtype,
    low: tuple[int, int] | None,
) -> None:
    """The error against float64 is at most the gathered reference's own and a floor of a few roundings."""
    torch.manual_seed(0)
    options: dict[str, Any] = {"head_dim": head_dim, "roles": roles, "tile_relations": tile, **place}
    kind: type[Any] = Translution
    if low is not None:
        kind, options = AlphaTranslution, options | {"c1": low[0], "c2": low[1]}
    exact = kind(dim, heads, implementation="gather", **options).double()
    fast = kind(dim, heads, workspace_bytes=workspace, **options).to(dtype)
    slow = kind(dim, heads, implementation="gather", **options).to(dtype)
    for layer in (fast, slow):
        layer.load_state_dict(exact.state_dict())
    exact.load_state_dict(fast.state_dict())  # The rounded weights, so that only the arithmetic differs.
    x = torch.randn(batch, exact.geometry.tokens, dim).to(dtype)
    results = []
    for layer in (fast, slow, exact):
        own = x.to(next(layer.parameters()).dtype).requires_grad_()
        results.append([value.detach().double() for value in outputs(layer, own, torch.ones_like(own))])
    for ours, reference, truth in zip(*results, strict=True):
        scale = float(truth.abs().max()) + 1
        floor = 16 * torch.finfo(dtype).eps * scale
        error, allowed = (ours - truth).abs().max(), (reference - truth).abs().max()
        assert error <= 2 * allowed + floor


def test_tables_are_numbered_as_in_the_paper_and_survive_any_tiling() -> None:
    torch.manual_seed(0)
    whole, tiled = Translution(4, 1, grid=(2, 3)), Translution(4, 1, grid=(2, 3), tile_relations=4)
    for role in ("query", "key", "value"):
        table = torch.randn(15, 4, 4)
        for layer in (whole, tiled):
            layer.tables.load_table(role, table)
            torch.testing.assert_close(layer.tables.table(role), table, rtol=0, atol=0)
    x = torch.randn(2, 6, 4)
    torch.testing.assert_close(whole(x), tiled(x))


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


@pytest.mark.parametrize("roles", ["qkv", "kv", "q", "v"])
@pytest.mark.parametrize("layer", [Translution, AlphaTranslution])
def test_autocast_computes_in_bfloat16_and_keeps_gradients_in_float32(layer: type[Any], roles: str) -> None:
    torch.manual_seed(0)
    ours = layer(16, 2, grid=(3, 4), class_token=True, roles=roles, workspace_bytes=3000)
    x = torch.randn(2, 13, 16, requires_grad=True)
    exact = outputs(ours, x, torch.ones(2, 13, 16))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = ours(x)
    assert out.dtype == torch.bfloat16
    found = [out, *torch.autograd.grad(out, [x, *ours.parameters()], torch.ones_like(out))]
    for near, true in zip(found[1:], exact[1:], strict=True):
        assert near.dtype == torch.float32
        # bf16 keeps 8 bits: the error is a few hundredths of the largest value.
        assert (near - true).abs().max() <= 0.05 * true.abs().max() + 1e-3


def test_rotary_angles_do_not_depend_on_zeros_patched_constructors() -> None:
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


def test_the_layer_runs_on_one_head_without_projection() -> None:
    layer = Translution(6, 1, grid=(2, 2))
    assert isinstance(layer.output, nn.Identity)
    assert layer(torch.randn(2, 4, 6)).shape == (2, 4, 6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"grid": (2, 2), "length": 4}, "grid: .* give exactly one"),
        ({}, "grid: None"),
        ({"grid": (2, 2), "causal": True}, "causal: True"),
        ({"length": 4, "class_token": True}, "class_token: True"),
        ({"length": 4, "heads": 4}, "heads: 4 is not allowed: must divide dim 6"),
        ({"length": 4, "roles": "qx"}, "roles: 'qx'"),
        ({"length": 0}, "length: 0"),
        ({"length": 4, "tile_relations": 0}, "tile_relations: 0"),
        ({"length": 4, "implementation": "fast"}, "implementation: 'fast'"),
        ({"length": 4, "workspace_bytes": 0}, "workspace_bytes: 0"),
    ],
)
def test_a_wrong_argument_names_itself(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Translution(6, arguments.pop("heads", 2), **arguments)


def test_a_wrong_shape_names_itself() -> None:
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
