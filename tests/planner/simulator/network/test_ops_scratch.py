"""The scratch that oneDNN allocates for bf16 products on this processor, compared with the simulator's upper bound."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor

from translution.distributed.profiling.allocation_tracer import count_every_allocation, trace_allocations
from translution.planner.simulator.network.ops import DtypeSizes, product_scratch_bytes

pytestmark = pytest.mark.usefixtures("one_thread")

BF16 = torch.bfloat16
SIZES = DtypeSizes.of(2, "cpu")
PROBE_BYTES = 1
"""Bytes that the trace itself allocates at its start."""


def scratch_bytes(left: Tensor, right: Tensor) -> int:
    """Return the bytes that a product allocates in addition to its result."""
    left @ right  # The first call makes the library's permanent allocations.
    results: list[Tensor] = []
    begin, highest = trace_allocations(lambda: results.append(left @ right))
    return highest - begin - PROBE_BYTES - results[0].nbytes


@pytest.mark.parametrize("rows", [1, 7, 100, 1000])
def test_products_of_a_linear_layer_need_no_more_than_the_bound(rows: int) -> None:
    """Forward, the input's gradient and the weight's gradient, at odd sizes too."""
    count_every_allocation()
    for d_in, d_out in product((8, 30, 96, 211, 768, 3072), (3, 16, 64, 100, 768)):
        x, weight = torch.randn(rows, d_in, dtype=BF16), torch.randn(d_out, d_in, dtype=BF16)
        grad = torch.randn(rows, d_out, dtype=BF16)
        measured = scratch_bytes(x, weight.t())
        assert measured <= product_scratch_bytes(rows, d_in, d_out, SIZES), (d_in, d_out)
        measured = scratch_bytes(grad, weight)
        assert measured <= product_scratch_bytes(rows, d_out, d_in, SIZES), (d_in, d_out)
        measured = scratch_bytes(grad.t(), x)
        assert measured <= product_scratch_bytes(d_out, rows, d_in, SIZES, transposed=True), (d_in, d_out)


@pytest.mark.parametrize("tokens", [5, 24, 197])
def test_products_by_heads_need_no_more_than_the_bound(tokens: int) -> None:
    count_every_allocation()
    for head_dim, batch in product((8, 64), (1, 48)):
        rows = torch.randn(batch, tokens, head_dim, dtype=BF16)
        weights = torch.randn(batch, tokens, tokens, dtype=BF16)
        bound = product_scratch_bytes(tokens, max(tokens, head_dim), tokens, SIZES, transposed=True)
        for left, right in ((rows, rows.transpose(1, 2)), (weights, rows), (weights.transpose(1, 2), rows)):
            assert scratch_bytes(left, right) <= bound, (head_dim, batch)
