"""Tests of the fused kernels on a CPU, in Triton's interpreter, which must be chosen before triton is imported.

tests/models/ops/fused/test_kernels.py runs them:
TRITON_INTERPRET=1 python -m pytest -n 0 tests/programs/interpreted_kernels.py
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from helpers.operator_pairs import ROLES, outputs
from torch import Tensor

from translution.models import AlphaTranslution, Translution
from translution.models.layers import RelationTables
from translution.models.ops.fused import configs, fused_is_correct, support, tile
from translution.planner.common import InputError
from translution.planner.config import RelationGeometry, deal_relations, owned_geometry

assert os.environ["TRITON_INTERPRET"] == "1"
CPU = torch.device("cpu")
SMALL = configs.KernelConfig(16, 16, 16, 4, 1)
"""Several programs and several steps for a tiny relation."""
TINY: dict[str, Any] = {"grid": (2, 2), "class_token": True}
ALPHA = {"c1": 4, "c2": 8}
GEOMETRIES: list[dict[str, Any]] = [
    {"length": 1},
    {"length": 4},
    {"length": 5, "causal": True},
    {"grid": (2, 2)},
    {"grid": (1, 3)},
    {"grid": (2, 2), "class_token": True},
    {"grid": (3, 1), "class_token": True},
    {"length": 5, "window": 1},
    {"length": 5, "causal": True, "window": 2},
    {"grid": (2, 3), "class_token": True, "window": 1},
    {"grid": (2, 1, 2), "class_token": True},
    {"grid": (2, 2, 2), "causal": True, "window": (None, 1, 0)},
    {"grid": (2, 1, 2), "class_token": True, "causal": True},
]


def layers(kind: type[Any], dim: int, heads: int, dtype: torch.dtype, **options: Any) -> list[Any]:
    """The fused layer, the reference, and the reference in float64, with the same weights."""
    torch.manual_seed(0)
    fast = kind(dim, heads, implementation="fused", **options).to(dtype)
    slow = kind(dim, heads, implementation="naive", **options).to(dtype)
    exact = kind(dim, heads, implementation="naive", **options).double()
    for layer in (slow, exact):
        layer.load_state_dict(fast.state_dict())
    return [fast, slow, exact]


def compare(found: Sequence[Sequence[Tensor]], dtype: torch.dtype) -> None:
    """Assert that the error is at most twice the reference's plus a few roundings."""
    for ours, reference, truth in zip(*found, strict=True):
        floor = 16 * torch.finfo(dtype).eps * (float(truth.detach().abs().max()) + 1)
        error, allowed = (ours - truth).abs().max(), (reference - truth).abs().max()
        assert error <= 2 * allowed + floor


def check(
    kind: type[Any],
    dim: int,
    heads: int,
    dtype: torch.dtype,
    *,
    batch: int = 3,
    deterministic: bool = False,
    padding: Tensor | None = None,
    **options: Any,
) -> None:
    """Compare output and all gradients with the reference and the truth."""
    made = layers(kind, dim, heads, dtype, **options)
    made[0].tables.deterministic = deterministic
    tokens = made[0].geometry.tokens
    x, grad = torch.randn(batch, tokens, dim).to(dtype), torch.randn(batch, tokens, dim).to(dtype)
    found = []
    for layer in made:
        torch.manual_seed(1)
        own = x.to(next(layer.parameters()).dtype).requires_grad_()
        out = layer(own, padding)
        values = [out, *torch.autograd.grad(out, [own, *layer.parameters()], grad.to(out.dtype))]
        found.append([value.detach().double() for value in values])
    compare(found, dtype)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("number", range(len(GEOMETRIES)), ids=lambda number: str(GEOMETRIES[number]))
def test_every_geometry_equals_the_reference(number: int) -> None:
    heads, head_dim = ((2, 8), (3, 12))[number % 2]
    tiles = {"tile_relations": (None, 4)[number // 2 % 2], "roles": ROLES[number % len(ROLES)]}
    batch = (1, 3)[number // 4 % 2]
    check(Translution, 20, heads, torch.float32, head_dim=head_dim, batch=batch, **tiles, **GEOMETRIES[number])


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("deterministic", [False, True])
def test_a_part_of_the_relations_equals_the_grouped_operator(deterministic: bool) -> None:
    """Ranks of a relation group have such parts."""
    geometry = RelationGeometry.grid(2, 2, class_token=True)
    part = owned_geometry(geometry, deal_relations(geometry, 2), 1)
    found = []
    for implementation in ("fused", "grouped"):
        torch.manual_seed(0)
        tables = RelationTables(
            part, 2, 20, 16, roles="qkv", scale=0.3, tile_relations=4, implementation=implementation
        )
        tables.deterministic = deterministic
        x = torch.randn(3, geometry.tokens, 20, requires_grad=True)
        out, _ = tables({"query": x, "key": x, "value": x})
        assert out is not None
        found.append(
            [out, *torch.autograd.grad(out, [x, *tables.parameters()], torch.linspace(-1, 1, out.numel()).view_as(out))]
        )
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", [Translution, AlphaTranslution])
def test_every_dtype_equals_the_reference(kind: type[Any], dtype: torch.dtype) -> None:
    more = {"head_dim": 12} if kind is Translution else {"roles": "kv", **ALPHA}
    deterministic = (kind is Translution) == (dtype == torch.float16)
    check(kind, 24, 2, dtype, deterministic=deterministic, batch=1, **TINY, **more)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize(("batch", "length"), [(17, 2), (3, 7), (16, 3)])
def test_blocks_smaller_than_a_relation_equal_the_reference(
    batch: int, length: int, deterministic: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Samples of a pair in several blocks, pairs in one block, and a pair that fills a block."""
    monkeypatch.setattr(configs, "_INTERPRETED", (SMALL,))
    more: dict[str, Any] = {"c1": 8, "c2": 8, "roles": "qv"} if deterministic else {"head_dim": 12}
    kind = AlphaTranslution if deterministic else Translution
    check(kind, 24, 2, torch.float32, deterministic=deterministic, batch=batch, length=length, **more)


@pytest.mark.usefixtures("poisoned")
def test_padding_and_dropout_are_those_of_the_reference() -> None:
    padding = torch.zeros(3, 4, dtype=torch.bool)
    padding[0, 1:3] = True
    padding[1] = True
    check(Translution, 16, 2, torch.float32, padding=padding, dropout=0.3, length=4)


def test_relations_too_large_for_the_scratch_memory_are_left_to_the_grouped_operator() -> None:
    check(Translution, 16, 2, torch.float32, length=4, workspace_bytes=2500)


def test_autocast_computes_in_bfloat16_and_keeps_gradients_in_float32() -> None:
    ours, _, exact = layers(Translution, 16, 2, torch.float32, **TINY)
    x = torch.randn(2, 5, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        own = x.clone().requires_grad_()
        out = ours(own)
    assert out.dtype == torch.bfloat16
    found = torch.autograd.grad(out, [own, *ours.parameters()], torch.ones_like(out))
    truth = outputs(exact, x.double().requires_grad_(), torch.ones(2, 5, 16).double())
    for near, true in zip(found, truth[1:], strict=True):
        assert near.dtype == torch.float32
        assert (near - true).abs().max() <= 0.05 * true.abs().max() + 1e-3


@pytest.mark.parametrize("frozen", ["x", "tables.logit_tiles.0.query", "tables.value_tiles.0.value", "tables"])
def test_frozen_tensors_get_no_gradient_and_the_others_the_same(frozen: str) -> None:
    made = layers(Translution, 16, 2, torch.float32, length=2)
    data, found = torch.randn(1, 2, 16), []
    for layer in made:
        x = data.to(next(layer.parameters()).dtype).requires_grad_(frozen != "x")
        for name, parameter in layer.named_parameters():
            parameter.requires_grad_(not name.startswith(frozen))
        out = layer(x)
        wanted = [tensor for tensor in (x, *layer.parameters()) if tensor.requires_grad]
        found.append([g.double() for g in torch.autograd.grad(out, wanted, torch.ones_like(out))])
    compare(found, torch.float32)


def record(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, list[list[int]], dict[str, Any]]]:
    """Record the name, the blocks and the constants of every launch."""
    launches: list[tuple[str, list[list[int]], dict[str, Any]]] = []
    true = tile.launch_kernel

    def spy(
        kernel: str, programs: int, arguments: Sequence[Any], constants: dict[str, Any], *others: Any, **more: Any
    ) -> None:
        (position,) = [n for n, x in enumerate(arguments) if isinstance(x, Tensor) and x.dtype == torch.int32][:1]
        entries, start = arguments[position], arguments[position + 3]
        per_block = max(1, programs // len(entries))
        launches.append((kernel, entries[start : start + max(1, programs // per_block)].tolist(), constants))
        true(kernel, programs, arguments, constants, *others, **more)

    monkeypatch.setattr(tile, "launch_kernel", spy)
    return launches


@pytest.mark.parametrize("deterministic", [False, True])
def test_deterministic_sums_take_one_relation_after_the_other_without_atomics(
    deterministic: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    launches = record(monkeypatch)
    layer = Translution(16, 2, grid=(2, 2), class_token=True, implementation="fused")
    torch.use_deterministic_algorithms(deterministic)
    try:
        layer(torch.randn(2, 5, 16, requires_grad=True)).sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)
    sums = [(blocks, constants["ATOMIC"]) for _, blocks, constants in launches if "ATOMIC" in constants]
    assert {atomic for _, atomic in sums} == {not deterministic}
    relations = [{block[0] for block in blocks} for blocks, _ in sums]
    # The output, and gradients of the inputs of queries, keys and values, for nine relations of patches; those with the
    # class token are left to the grouped operator.
    assert relations == ([{n} for n in range(9)] * 4 if deterministic else [set(range(12))] * 4)


def test_it_saves_the_same_bytes_as_the_grouped_operator() -> None:
    saved = []
    for implementation in ("grouped", "fused"):
        layer = Translution(16, 2, **TINY, implementation=implementation)
        sizes: dict[int, int] = {}

        def pack(tensor: Tensor, sizes: dict[int, int] = sizes) -> Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            layer(torch.randn(3, 5, 16, requires_grad=True))
        saved.append(sum(sizes.values()))
    assert saved[0] == saved[1]


def test_the_trial_tells_right_results_from_wrong_ones_and_from_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    assert fused_is_correct(CPU, torch.float32, (16, 32), 2)
    true = tile.launch_kernel

    def wrong(kernel: str, programs: int, arguments: Sequence[Any], *rest: Any, **more: Any) -> None:
        true(kernel, programs, arguments, *rest, **more)
        if kernel == "matrix_gradients_kernel":
            arguments[0][0, 0, 0] += 1

    def broken(*_: Any, **more: Any) -> None:
        raise OSError("no compiler\nsecond line")

    for replacement, text in ((wrong, "wrong results"), (broken, "OSError: no compiler$")):
        support.fused_is_correct.cache_clear()
        monkeypatch.setattr(tile, "launch_kernel", replacement)
        with pytest.warns(UserWarning, match=text):
            assert not fused_is_correct(CPU, torch.float32, (16, 32), 2)


def test_the_custom_operator_passes_torchs_own_check_with_fused_kernels() -> None:
    tables, found = Translution(16, 2, length=2).tables, [torch.randn(1, 2, 16, requires_grad=True) for _ in range(3)]
    arguments = (found, list(tables.parameters()), None, torch.tensor(0), tables.description)
    torch.library.opcheck(
        torch.ops.translution.attend.default,
        (*arguments, "fused None 100000 0.0 query key value"),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )


def test_it_refuses_what_it_cannot_compute() -> None:
    for layer, text in (
        (Translution(8, 2, length=2, implementation="fused").double(), "not in float64"),
        (Translution(8, 1, length=2, head_dim=257, implementation="fused"), "at most 256, not 257"),
    ):
        x = torch.zeros(1, 2, 8, dtype=next(layer.parameters()).dtype)
        with pytest.raises(InputError, match=text):
            layer(x)
