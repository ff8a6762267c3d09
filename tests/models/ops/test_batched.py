"""The batched operator, many relations at a time: its index lists, products and scratch memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.operator_pairs import LAYERS, LAYOUTS, layer_pair, outputs
from torch import Tensor

from translution.distributed.profiling.allocation_tracer import count_every_allocation, trace_allocations
from translution.models import AlphaTranslution, BiasAttention, ShawAttention, Translution
from translution.models.ops import batched
from translution.models.ops.grouped_mm import GroupedProducts, SeparateProducts, choose_products, grouped_mm_is_correct
from translution.models.ops.pair_index import cut_tile
from translution.planner.config.geometry import RelationGeometry

CPU = torch.device("cpu")
GEOMETRIES = [
    RelationGeometry.sequence(1),
    RelationGeometry.sequence(6),
    RelationGeometry.sequence(7, causal=True),
    RelationGeometry.sequence(9, causal=True, window=3),
    RelationGeometry.grid(3, 4, class_token=True),
    RelationGeometry.grid(4, 3, window=1),
]


@pytest.mark.parametrize("max_pairs", [0, 5, 1000])
@pytest.mark.parametrize("tile", [1, 4, 100])
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_chunks_contain_every_pair_once_within_the_limit(geometry: RelationGeometry, tile: int, max_pairs: int) -> None:
    found: list[tuple[int, int, int]] = []
    for first in range(0, geometry.relations, tile):
        count = min(tile, geometry.relations - first)
        chunks, leftover = cut_tile(geometry, first, count, max_pairs, CPU)
        for chunk in chunks:
            assert chunk.pairs <= max_pairs
            relations = [chunk.first + n for n, size in enumerate(chunk.counts) for _ in range(size)]
            assert chunk.ends.tolist() == torch.tensor(chunk.counts).cumsum(0).tolist()
            assert chunk.positions.tolist() == (chunk.query * geometry.tokens + chunk.key)[:-1].tolist()
            found += zip(chunk.query[:-1].tolist(), chunk.key[:-1].tolist(), relations, strict=True)
        for relation in leftover:
            assert relation >= geometry.offsets or geometry.pairs(relation).count > max_pairs
            found += [
                (i, j, relation)
                for i in range(geometry.tokens)
                for j in range(geometry.tokens)
                if geometry.relation(i, j) == relation
            ]
    everything = [
        (i, j, relation)
        for i in range(geometry.tokens)
        for j in range(geometry.tokens)
        if (relation := geometry.relation(i, j)) is not None
    ]
    assert sorted(found) == everything


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_slots_list_each_tokens_pairs_and_at_most_half_are_padding(geometry: RelationGeometry) -> None:
    chunks, _ = cut_tile(geometry, 0, geometry.relations, 1000, CPU)
    for chunk in chunks:
        for slots, tokens in ((chunk.query_slots, chunk.query), (chunk.key_slots, chunk.key)):
            assert len(slots.pairs) <= 2 * chunk.pairs
            rows = slots.pairs.view(len(slots.tokens), -1).tolist()
            for token, row in zip(slots.tokens.tolist(), rows, strict=True):
                expected = [n for n in range(chunk.pairs) if tokens[n] == token]
                assert sorted(row) == expected + [chunk.pairs] * (len(row) - len(expected))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("counts", [(3, 8, 1, 20), (4, 4, 4), (1,)], ids=str)
def test_products_in_one_kernel_equal_separate_products(counts: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    rows, grads = torch.randn(sum(counts) + 2, 16).to(dtype), torch.randn(sum(counts) + 2, 24).to(dtype)
    matrices = torch.randn(len(counts), 16, 24).to(dtype)
    ends = torch.tensor(counts).cumsum(0).to(torch.int32)
    limits = {"rtol": 0, "atol": 64 * torch.finfo(dtype).eps}
    for products in (GroupedProducts(), SeparateProducts()):
        out = torch.empty(len(counts), 16, 24)
        forward = products.multiply(rows, matrices, counts, ends)
        products.matrix_gradients(rows, grads, counts, ends, out)
        begin = 0
        for group, count in enumerate(counts):
            own = slice(begin, begin + count)
            exact = rows[own].double() @ matrices[group].double()
            torch.testing.assert_close(forward[own].double(), exact, **limits)
            exact = rows[own].double().t() @ grads[own].double()
            torch.testing.assert_close(out[group].double(), exact, **limits)
            begin += count
        assert not forward[begin:].any()


def test_grouped_products_are_used_only_after_a_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    assert grouped_mm_is_correct(CPU, torch.bfloat16, 16, 24)
    assert not grouped_mm_is_correct(CPU, torch.bfloat16, 15, 24)  # torch requires rows of a multiple of 16 bytes.
    assert not grouped_mm_is_correct(CPU, torch.float64, 16, 24)
    assert isinstance(choose_products(CPU, torch.bfloat16, 16, 24), SeparateProducts)
    true = torch.nn.functional.grouped_mm
    monkeypatch.setattr(torch.nn.functional, "grouped_mm", lambda *args, **more: true(*args, **more) * 1.5)
    assert not grouped_mm_is_correct(CPU, torch.bfloat16, 16, 24)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("roles", ["qkv", "kv", "q"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_layer_with_grouped_products_equals_the_reference(
    layout: dict[str, Any], roles: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    calls: list[int] = []

    def choose(*_: object) -> GroupedProducts:
        calls.append(1)
        return GroupedProducts()

    monkeypatch.setattr(batched, "choose_products", choose)
    fast = Translution(16, 2, roles=roles, tile_relations=5, implementation="batched", **layout)
    slow = Translution(16, 2, roles=roles, tile_relations=5, implementation="gather", **layout)
    slow.load_state_dict(fast.state_dict())
    x, grad = torch.randn(3, fast.geometry.tokens, 16, requires_grad=True), torch.randn(3, fast.geometry.tokens, 16)
    for ours, reference in zip(outputs(fast, x, grad), outputs(slow, x, grad), strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-5)
    assert calls


@pytest.mark.parametrize("implementation", ["grouped", "batched"])
def test_only_the_batched_operator_multiplies_relations_together(
    implementation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups: list[int] = []
    true = SeparateProducts.multiply

    def spy(self: SeparateProducts, rows: Tensor, matrices: Tensor, counts: Any, ends: Tensor) -> Tensor:
        groups.append(len(matrices))
        return true(self, rows, matrices, counts, ends)

    monkeypatch.setattr(SeparateProducts, "multiply", spy)
    layer = Translution(8, 2, grid=(3, 3), class_token=True, implementation=implementation)
    layer(torch.randn(2, 10, 8)).sum().backward()
    # 25 offsets for each of q, k and v, in forward and again in backward; x requires no gradient.
    assert sum(groups) == (2 * 3 * 25 if implementation == "batched" else 0)


@pytest.mark.parametrize(("layer", "options"), LAYERS[:2], ids=["full", "alpha"])
def test_it_saves_the_same_bytes_as_the_grouped_operator_and_is_deterministic(
    layer: type[Any], options: dict[str, Any]
) -> None:
    saved_bytes = []
    layout = {"grid": (3, 4), "class_token": True}
    for implementation in ("grouped", "batched"):
        ours = layer(8, 2, **layout, **options, implementation=implementation)
        sizes: dict[int, int] = {}

        def pack(tensor: Tensor, sizes: dict[int, int] = sizes) -> Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        x = torch.randn(3, 13, 8, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            ours(x)
        saved_bytes.append(sum(sizes.values()))
        first, second = (outputs(ours, x, torch.ones_like(x)) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert saved_bytes[0] == saved_bytes[1]


@pytest.mark.parametrize("batch", [4, 16])
@pytest.mark.parametrize("limit", [2**18, 2**20])
def test_scratch_memory_stays_within_its_bound(limit: int, batch: int) -> None:
    count_every_allocation()
    layer = Translution(32, 2, length=48, implementation="batched", workspace_bytes=limit)
    x = torch.randn(batch, 48, 32, requires_grad=True)
    layer(x).sum().backward()  # The first call builds and caches the index lists.
    layer.zero_grad(set_to_none=True)
    out: list[Tensor] = []
    begin, highest = trace_allocations(lambda: out.append(layer(x).sum()))
    rows, pairs = 4 * batch * 48 * 32, 4 * batch * 2 * 48**2
    # Attention weights, sums over keys, the output and its projection, and the sums by token of one chunk.
    assert highest - begin <= limit + pairs + 5 * rows + pairs // 48
    begin, highest = trace_allocations(out[0].backward)
    tables = 3 * 95 * 32 * 32 * 4
    assert highest - begin <= limit + tables + pairs + pairs // 48 + 7 * rows


@pytest.mark.parametrize("implementation", ["grouped", "batched", "gather"])
@pytest.mark.parametrize("layout", [LAYOUTS[2], LAYOUTS[5], LAYOUTS[9]], ids=str)
@pytest.mark.parametrize(("layer", "options"), [*LAYERS, (BiasAttention, {}), (ShawAttention, {})])
def test_every_tensor_is_created_on_the_layers_device(
    layer: type[Any], options: dict[str, Any], layout: dict[str, Any], implementation: str
) -> None:
    """The meta device replaces a GPU: its tensors do not combine with those of another device."""
    if layer in (Translution, AlphaTranslution):
        options = options | {"implementation": implementation, "tile_relations": 4}
    ours = layer(8, 2, **layout, **options).to("meta")
    tokens = ours.geometry.tokens
    x, mask = torch.randn(2, tokens, 8, device="meta", requires_grad=True), torch.zeros(2, tokens, device="meta").bool()
    ours(x, mask).sum().backward()
    assert x.grad is not None
    assert all(parameter.grad is not None for parameter in ours.parameters())


@pytest.mark.usefixtures("double", "poisoned")
def test_it_applies_dropout_and_masks_like_the_reference() -> None:
    fast, slow = layer_pair(
        Translution, {"grid": (2, 3), "class_token": True, "dropout": 0.3}, tile_relations=4, implementation="batched"
    )
    mask = torch.zeros(3, 7, dtype=torch.bool)
    mask[0, 3:5] = True
    mask[1] = True
    x, grad, found = torch.randn(3, 7, 6, requires_grad=True), torch.randn(3, 7, 6), []
    for layer in (fast, slow):
        torch.manual_seed(1)
        out = layer(x, mask)
        found.append([out, *torch.autograd.grad(out, [x, *layer.parameters()], grad)])
    for ours, reference in zip(*found, strict=True):
        torch.testing.assert_close(ours, reference, rtol=0, atol=1e-10)


@pytest.mark.parametrize("roles", ["qkv", "kv", "q", "v"])
def test_autocast_computes_in_bfloat16_and_keeps_gradients_in_float32(roles: str) -> None:
    torch.manual_seed(0)
    layout: dict[str, Any] = {"grid": (3, 4), "class_token": True, "roles": roles}
    ours = Translution(16, 2, **layout, workspace_bytes=30_000, implementation="batched")
    x = torch.randn(2, 13, 16, requires_grad=True)
    exact = outputs(ours, x, torch.ones(2, 13, 16))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = ours(x)
    assert out.dtype == torch.bfloat16
    for near, true in zip(
        torch.autograd.grad(out, [x, *ours.parameters()], torch.ones_like(out)), exact[1:], strict=True
    ):
        assert near.dtype == torch.float32
        assert (near - true).abs().max() <= 0.05 * true.abs().max() + 1e-3
