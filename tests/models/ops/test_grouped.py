"""The grouped operator against the gathered reference, and the reference against the definition."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.chance import examples
from helpers.operator_pairs import LAYERS, LAYOUTS, ROLES, layer_pair, outputs
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from translution.models import AlphaTranslution, Translution

VARIED = (LAYOUTS[2], LAYOUTS[5], LAYOUTS[9], LAYOUTS[12])
WINDOWS = st.one_of(st.none(), st.integers(0, 4))


SETUPS: dict[str, tuple[str, int | None, int]] = {
    "one piece": ("grouped", None, 2**28),
    "single-rows": ("grouped", 1, 1),
    "pieces": ("grouped", 3, 700),
    "batched": ("batched", None, 2**28),
    "chunks": ("batched", 5, 4000),
}


@pytest.mark.usefixtures("double", "poisoned")
@pytest.mark.parametrize(
    ("layout", "roles"),
    # The roles matter where relations differ in kind: causal, with a class token, with a window.
    [(layout, roles) for layout in LAYOUTS for roles in (ROLES if layout in VARIED else ("qkv", "kv", "q"))],
    ids=str,
)
@pytest.mark.parametrize(
    ("layer", "options", "setup"),
    # The operator sees a layer of low rank as one of other widths: how its products are cut is tried with the full one.
    [
        *((*LAYERS[0], setup) for setup in SETUPS.values()),
        *((*layer, SETUPS[name]) for layer in LAYERS[1:] for name in ("pieces", "chunks")),
    ],
    ids=[*(f"full-{name}" for name in SETUPS), "alpha-pieces", "alpha-chunks", "rotary-pieces", "rotary-chunks"],
)
def test_grouped_equals_gathered(
    layer: type[Any], options: dict[str, Any], layout: dict[str, Any], roles: str, setup: tuple[str, int | None, int]
) -> None:
    implementation, tile, workspace = setup
    options = {**options, **layout, "roles": roles}
    ours: dict[str, Any] = {"tile_relations": tile, "workspace_bytes": workspace, "implementation": implementation}
    fast, slow = layer_pair(layer, options, **ours)
    tokens = fast.geometry.tokens
    x, grad = torch.randn(3, tokens, 6, requires_grad=True), torch.randn(3, tokens, 6)
    for ours, reference in zip(outputs(fast, x, grad), outputs(slow, x, grad), strict=True):
        torch.testing.assert_close(ours, reference, rtol=0, atol=1e-10)


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_the_reference_matches_the_definition_pair_by_pair(layout: dict[str, Any]) -> None:
    """Compare the gathered operator with loops that follow the paper's equations."""
    torch.manual_seed(0)
    layer = Translution(4, 2, **layout, implementation="gather")
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
@pytest.mark.parametrize("layout", [{"length": 3, "causal": True}, {"grid": (2, 2), "class_token": True}], ids=str)
@pytest.mark.parametrize("roles", ["qkv", "k", "v"])
@pytest.mark.parametrize("setup", [("grouped", 1), ("batched", 600)], ids=["grouped", "batched"])
def test_gradcheck(layout: dict[str, Any], roles: str, setup: tuple[str, int]) -> None:
    torch.manual_seed(0)
    ours: dict[str, Any] = {"tile_relations": 2, "implementation": setup[0], "workspace_bytes": setup[1]}
    layer = Translution(1, 1, head_dim=2, roles=roles, **ours, **layout)
    names = [name for name, _ in layer.named_parameters()]
    weights = [torch.randn_like(parameter, requires_grad=True) for parameter in layer.parameters()]

    def call(x: Tensor, *values: Tensor) -> Tensor:
        result: Tensor = torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))
        return result

    x = torch.randn(2, layer.geometry.tokens, 1, requires_grad=True)
    assert torch.autograd.gradcheck(call, (x, *weights))


@pytest.mark.usefixtures("double", "poisoned")
@pytest.mark.parametrize("frozen", ["query", "key", "value", "x", "all but x", "all but value"])
@pytest.mark.parametrize("implementation", ["grouped", "batched"])
def test_any_subset_of_gradients(frozen: str, implementation: str) -> None:
    options = {"grid": (2, 3), "class_token": True}
    fast, slow = layer_pair(Translution, options, tile_relations=4, implementation=implementation)
    x = torch.randn(2, 7, 6, requires_grad=frozen != "x")
    for layer in (fast, slow):
        for name, parameter in layer.named_parameters():
            trained = {"all but x": False, "all but value": name.endswith("value")}
            parameter.requires_grad_(trained.get(frozen, not name.endswith(frozen)))
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


@examples(60)
@given(
    layout=st.one_of(
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
    workspace=st.sampled_from([1, 500, 5000, 2**20]),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    low=st.one_of(st.none(), st.tuples(st.integers(1, 4), st.integers(1, 4))),
    implementation=st.sampled_from(["grouped", "batched"]),
)
def test_any_layer_is_as_exact_as_its_reference(
    layout: dict[str, Any],
    roles: str,
    heads: int,
    head_dim: int,
    dim: int,
    batch: int,
    tile: int | None,
    workspace: int,
    dtype: torch.dtype,
    low: tuple[int, int] | None,
    implementation: str,
) -> None:
    """The error against float64 is at most twice the gathered reference's plus a few roundings."""
    torch.manual_seed(0)
    options: dict[str, Any] = {"head_dim": head_dim, "roles": roles, "tile_relations": tile, **layout}
    kind: type[Any] = Translution
    if low is not None:
        kind, options = AlphaTranslution, options | {"c1": low[0], "c2": low[1]}
    exact = kind(dim, heads, implementation="gather", **options).double()
    fast = kind(dim, heads, workspace_bytes=workspace, implementation=implementation, **options).to(dtype)
    slow = kind(dim, heads, implementation="gather", **options).to(dtype)
    for layer in (fast, slow):
        layer.load_state_dict(exact.state_dict())
    exact.load_state_dict(fast.state_dict())  # Rounded weights, so that only the arithmetic differs.
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


def test_tables_are_numbered_as_in_the_paper_with_any_tiling() -> None:
    torch.manual_seed(0)
    untiled, tiled = Translution(4, 1, grid=(2, 3)), Translution(4, 1, grid=(2, 3), tile_relations=4)
    for role in ("query", "key", "value"):
        table = torch.randn(15, 4, 4)
        for layer in (untiled, tiled):
            layer.tables.load_table(role, table)
            torch.testing.assert_close(layer.tables.table(role), table, rtol=0, atol=0)
    x = torch.randn(2, 6, 4)
    torch.testing.assert_close(untiled(x), tiled(x))
