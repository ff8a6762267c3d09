"""Every way to compute the operator on the device that is there: a GPU if there is one, otherwise the CPU.

`pytest -m gpu` runs these on a machine with a GPU, without the fixtures of conftest.py, which need more packages.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.operator_pairs import outputs
from torch import Tensor, nn

from translution.models import AbsoluteTranslution, AlphaTranslution, BiasAttention, SelfAttention, ShawAttention
from translution.models import Translution as FullTranslution
from translution.models.ops import batched
from translution.models.ops.fused import fused_is_correct, fused_problem
from translution.models.ops.grouped_mm import GroupedProducts, Products, SeparateProducts, grouped_mm_is_correct

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DIM, HEADS, BATCH = 32, 2, 3
LAYOUTS: list[dict[str, Any]] = [
    {"grid": (3, 4), "class_token": True},
    {"length": 9, "causal": True},
    {"grid": (3, 4), "class_token": True, "window": 1},
]
LAYERS: list[tuple[type[Any], dict[str, Any]]] = [
    (FullTranslution, {"roles": "qkv"}),
    (FullTranslution, {"roles": "kv"}),
    (AlphaTranslution, {"c1": 8, "c2": 16}),
]
LIMITS = {torch.float32: 5e-5, torch.bfloat16: 0.1}
"""Allowed error as a fraction of a tensor's largest value; a wrong index or factor gives an error of about 1."""
DTYPES = list(LIMITS)
FUSED = ["fused"] if fused_problem(DEVICE, torch.bfloat16, (DIM, DIM), HEADS) is None else []
"""The fused kernels, on a GPU that they support; tests/models/ops/fused tests them on a CPU."""
WAYS = ["grouped products", "separate products", "one relation at a time", "gathered", *FUSED]
GROUPED_DTYPES = [dtype for dtype in DTYPES if grouped_mm_is_correct(DEVICE, dtype, DIM, DIM)]
"""Dtypes that torch's grouped product supports on this device."""


def way_of(name: str, layer: type[Any], options: dict[str, Any], **more: Any) -> Any:
    """A layer that is computed in one of the ways, with several tiles and several chunks."""
    products: dict[str, Products] = {"grouped products": GroupedProducts(), "separate products": SeparateProducts()}
    implementation = {"gathered": "naive", "one relation at a time": "grouped", "fused": "fused"}.get(name, "batched")
    torch.manual_seed(0)
    own: Any = layer(
        DIM, HEADS, **options, **more, tile_relations=7, workspace_bytes=100_000, implementation=implementation
    )
    own.tables.products = products.get(name)
    return own


def data(layer: Any, seed: int = 1) -> tuple[Tensor, Tensor]:
    """An input and a gradient of the output, (batch, tokens, dim) in float64."""
    generator = torch.Generator().manual_seed(seed)
    x, grad = (
        torch.randn(BATCH, layer.geometry.tokens, DIM, generator=generator, dtype=torch.float64) for _ in range(2)
    )
    return x, grad


def run(layer: nn.Module, dtype: torch.dtype, device: torch.device = DEVICE) -> list[Tensor]:
    """Output and all gradients of the layer in a dtype on a device."""
    x, grad = (values.to(device, dtype) for values in data(layer))
    return outputs(layer.to(device, dtype), x.requires_grad_(), grad)


def truth(layer: type[Any], options: dict[str, Any], weights: dict[str, Tensor], **more: Any) -> list[Tensor]:
    """Output and all gradients of the reference in float64 on the CPU, from weights as they are."""
    reference = layer(DIM, HEADS, **options, **more).double()
    reference.load_state_dict({name: value.cpu().double() for name, value in weights.items()})
    return run(reference, torch.float64, torch.device("cpu"))


def errors(found: list[Tensor], exact: list[Tensor]) -> list[float]:
    """The largest error of each tensor, as a fraction of its largest value."""
    assert len(found) == len(exact)
    largest = []
    for own, right in zip(found, exact, strict=True):
        assert own.device.type == DEVICE.type
        scale = float(right.detach().abs().max())
        assert scale > 0
        largest.append(float((own.detach().cpu().double() - right.detach()).abs().max()) / scale)
    return largest


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize(("layer", "options"), LAYERS, ids=["qkv", "kv", "alpha"])
def test_output_and_gradients_equal_the_float64_reference(
    layer: type[Any],
    options: dict[str, Any],
    layout: dict[str, Any],
    way: str,
    dtype: torch.dtype,
) -> None:
    if way == "grouped products" and dtype not in GROUPED_DTYPES:
        way = "separate products"  # What a layer uses then.
    ours = way_of(way, layer, options, **layout).to(dtype)
    exact = truth(layer, options, ours.state_dict(), **layout, tile_relations=7, implementation="gather")
    assert max(errors(run(ours, dtype), exact)) <= LIMITS[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("layer", "options"),
    [
        (SelfAttention, {"rotary": True}),
        (BiasAttention, {}),
        (ShawAttention, {}),
        (AbsoluteTranslution, {"tile_relations": 5}),
    ],
    ids=["attention", "bias", "shaw", "absolute"],
)
def test_the_other_layers_equal_themselves_in_float64_on_the_cpu(
    layer: type[Any], options: dict[str, Any], dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    ours = layer(DIM, HEADS, grid=(3, 4), class_token=True, **options).to(dtype)
    exact = truth(layer, options, ours.state_dict(), grid=(3, 4), class_token=True)
    assert max(errors(run(ours, dtype), exact)) <= LIMITS[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("way", [*WAYS[:3], *FUSED])
@pytest.mark.parametrize(("layer", "options"), LAYERS, ids=["qkv", "kv", "alpha"])
def test_results_are_the_same_bit_for_bit(
    layer: type[Any], options: dict[str, Any], way: str, dtype: torch.dtype
) -> None:
    if way == "grouped products" and dtype not in GROUPED_DTYPES:
        way = "separate products"
    ours = way_of(way, layer, options, **LAYOUTS[0])
    ours.tables.deterministic = True  # The fused kernels' sums use atomics otherwise.
    first, second = run(ours, dtype), run(ours, dtype)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("layer", [BiasAttention, ShawAttention])
def test_sums_over_relations_are_the_same_bit_for_bit(layer: type[Any]) -> None:
    torch.manual_seed(0)
    ours = layer(DIM, HEADS, grid=(6, 6), class_token=True)
    first, second = run(ours, torch.float32), run(ours, torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_dropout_in_backward_is_that_of_forward() -> None:
    """With one key per query and values that are the identity, the gradient shows which weights were dropped."""
    layer = FullTranslution(DIM, HEADS, length=8, window=1, dropout=0.5).to(DEVICE)
    x = torch.randn(4, 8, DIM, device=DEVICE, requires_grad=True)
    torch.manual_seed(3)
    with torch.no_grad():
        dropped = layer(x)
    torch.manual_seed(3)
    out = layer(x)
    assert torch.equal(out, dropped)
    direction = torch.randn_like(out)
    (grad,) = torch.autograd.grad(out, x, direction)
    # The directional derivative along the input, by differences under the same dropout.
    step = 1e-2 * torch.randn_like(x)
    with torch.no_grad():
        ends = []
        for sign in (1, -1):
            torch.manual_seed(3)
            ends.append(layer(x + sign * step))
        numeric = float(((ends[0] - ends[1]) / 2 * direction).sum())
    assert float((grad * step).sum()) == pytest.approx(numeric, rel=0.02, abs=2e-3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("counts", [(3, 8, 1, 20), (16, 16, 16), (1,), (1, 130, 7)], ids=str)
@pytest.mark.parametrize("products", [GroupedProducts(), SeparateProducts()], ids=["grouped", "separate"])
def test_products_equal_float64(products: Products, counts: tuple[int, ...], dtype: torch.dtype) -> None:
    if isinstance(products, GroupedProducts) and dtype not in GROUPED_DTYPES:
        products = SeparateProducts()
    generator = torch.Generator().manual_seed(0)
    rows, grads = (torch.randn(sum(counts) + 2, width, generator=generator).to(DEVICE, dtype) for width in (64, 32))
    matrices = torch.randn(len(counts), 64, 32, generator=generator).to(DEVICE, dtype)
    ends = torch.tensor(counts, device=DEVICE).cumsum(0).to(torch.int32)
    out = torch.empty(len(counts), 64, 32, device=DEVICE)
    forward = products.multiply(rows, matrices, counts, ends)
    back = products.multiply(grads, matrices.transpose(1, 2), counts, ends)
    products.matrix_gradients(rows, grads, counts, ends, out)
    found: list[Tensor] = []
    exact: list[Tensor] = []
    begin = 0
    for group, count in enumerate(counts):
        own = slice(begin, begin + count)
        matrix, row, grad = (values.double() for values in (matrices[group], rows[own], grads[own]))
        found += [forward[own], back[own], out[group]]
        exact += [values.cpu() for values in (row @ matrix, grad @ matrix.t(), row.t() @ grad)]
        begin += count
    assert max(errors(found, exact)) <= LIMITS[dtype] / 5
    assert not forward[begin:].any() and not back[begin:].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_the_fused_kernels_pass_their_trial_on_a_gpu_that_they_support(dtype: torch.dtype) -> None:
    assert all(fused_is_correct(DEVICE, dtype, (DIM, DIM), HEADS) for _ in FUSED)


def test_a_gpu_is_used_if_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer on a GPU multiplies many relations at a time by itself, and on a CPU one."""
    calls: list[int] = []
    true = batched.choose_products

    def spy(*arguments: Any) -> Products:
        calls.append(1)
        return true(*arguments)

    monkeypatch.setattr(batched, "choose_products", spy)
    layer = FullTranslution(DIM, HEADS, **LAYOUTS[0])
    run(layer, torch.float32)
    assert bool(calls) == (DEVICE.type == "cuda")


@pytest.mark.parametrize("name", ["GroupedProducts", "SeparateProducts"])
def test_the_given_products_are_used(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kinds: dict[str, type[Any]] = {"GroupedProducts": GroupedProducts, "SeparateProducts": SeparateProducts}
    calls: list[str] = []
    for other, kind in kinds.items():
        true = kind.multiply

        def spy(self: Any, *arguments: Any, other: str = other, true: Any = true) -> Tensor:
            calls.append(other)
            result: Tensor = true(self, *arguments)
            return result

        monkeypatch.setattr(kind, "multiply", spy)
    layer = FullTranslution(DIM, HEADS, **LAYOUTS[0], implementation="batched")
    layer.tables.products = kinds[name]()
    run(layer, GROUPED_DTYPES[0])
    assert set(calls) == {name}
