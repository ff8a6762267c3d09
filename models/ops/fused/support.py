"""Where the fused operator can be used, and a trial of it."""

from __future__ import annotations

import importlib.util
import os
import warnings
from collections.abc import Callable
from functools import lru_cache, partial

import torch
from torch import Tensor

from translution.planner.config import FUSED_HEAD_DIM, RelationGeometry

from ..batched import BatchedTile
from ..context import RelationContext
from .tile import FusedTile

FUSED_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
"""Dtypes of the rows."""


def interpreted() -> bool:
    """True if Triton's interpreter runs kernels on the CPU, for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def fp32_products_use_tf32() -> bool:
    """True if torch lets products of fp32 round their operands to TF32."""
    return torch.get_float32_matmul_precision() != "highest"


def fused_problem(device: torch.device, dtype: torch.dtype, widths: tuple[int, int], heads: int) -> str | None:
    """Return what the fused operator needs and does not have here, or None.

    Args:
        device: device of the rows.
        dtype: dtype of the rows.
        widths: input and output width of the matrices.
        heads: number of attention heads.
    """
    if importlib.util.find_spec("triton") is None:
        return "needs the package triton"
    if dtype not in FUSED_DTYPES:
        return f"computes in bfloat16, float16 or float32, not in {str(dtype).removeprefix('torch.')}"
    if widths[1] // heads > FUSED_HEAD_DIM:
        return f"takes heads of a width of at most {FUSED_HEAD_DIM}, not {widths[1] // heads}"
    if device.type == "cpu" and interpreted():
        return None
    if device.type != "cuda" or torch.version.hip is not None:
        return "needs an NVIDIA GPU"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "needs a GPU of compute capability 8.0 or newer"
    return None


@lru_cache(maxsize=64)
def fused_is_correct(device: torch.device, dtype: torch.dtype, widths: tuple[int, int], heads: int) -> bool:
    """True if the kernels compile and agree with the batched operator on a small problem, forward and backward.

    Whether Triton works depends on the driver, the GPU and a C compiler; a warning says why it does not.

    Args:
        device, dtype, widths, heads: as in `fused_problem`.
    """
    try:
        found = _trial(device, dtype, widths, heads, partial(FusedTile, tune=False))
    except Exception as error:  # Compilers and drivers fail in many ways; the batched operator works without them.
        lines = str(error).strip().splitlines() or [""]
        warnings.warn(f"the fused operator does not work here: {type(error).__name__}: {lines[0]}", stacklevel=2)
        return False
    expected = _trial(device, dtype, widths, heads, BatchedTile)
    limit = 32 * torch.finfo(dtype).eps if not fp32_products_use_tf32() else 2**-6
    for ours, theirs in zip(found, expected, strict=True):
        if not bool((ours.float() - theirs.float()).abs().max() <= limit * theirs.float().abs().max()):
            warnings.warn("the fused operator gives wrong results here and is not used", stacklevel=2)
            return False
    return True


def _trial(
    device: torch.device,
    dtype: torch.dtype,
    widths: tuple[int, int],
    heads: int,
    kind: Callable[[RelationContext, int, int], FusedTile | BatchedTile],
) -> list[Tensor]:
    """Return what a tile computes of random data: logits, output and all gradients."""
    geometry, batch = RelationGeometry.sequence(5), 3
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device).to(dtype)

    context = RelationContext(geometry, heads, 1.0, 2**28)
    context.widths, count = widths, geometry.relations
    context.source = {name: random(batch, geometry.tokens, widths[0]) for name in ("query", "key", "value")}
    context.wanted = frozenset(context.source)
    tiles: dict[str, Tensor | None] = {name: random(count, *widths) * widths[0] ** -0.5 for name in context.source}
    grads: dict[str, Tensor | None] = {name: torch.zeros_like(tile) for name, tile in tiles.items() if tile is not None}
    pairs = (batch, heads, geometry.tokens, geometry.tokens)
    context.logits = torch.zeros(pairs, device=device)
    context.grad_attention, context.weights = random(*pairs).float(), random(*pairs)
    context.out = torch.zeros(batch, geometry.tokens, widths[1], device=device)
    context.grad_out = random(batch, geometry.tokens, widths[1])
    value, grad_value = tiles["value"], grads["value"]
    assert value is not None
    kind(context, 0, count).add_logits(tiles["query"], tiles["key"])
    kind(context, 0, count).logits_backward(tiles, grads)
    kind(context, 0, count).add_values(value)
    kind(context, 0, count).values_backward(value, grad_value)
    return [context.logits, context.out, context.grad_attention, *context.grads.values(),
            *(grad for grad in grads.values() if grad is not None)]  # fmt: skip
