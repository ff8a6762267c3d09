"""Grouped matrix products: each group of rows is multiplied by its own matrix.

`torch.nn.functional.grouped_mm` multiplies all groups in one kernel on a GPU. On other devices, and for
operands that it does not support, groups are multiplied one after the other; consecutive groups of
equal size are multiplied together.

Legend of shape suffixes: m rows of all groups, one group after the other, g groups, c input width,
e output width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import groupby
from typing import Protocol

import torch
from torch import Tensor


class Products(Protocol):
    """An implementation of grouped products. Rows after the last group give zeros and are otherwise ignored."""

    def multiply(self, rows_mc: Tensor, matrices_gce: Tensor, counts: Sequence[int], ends_g: Tensor) -> Tensor:
        """Multiply each row by its group's matrix.

        Args:
            rows_mc: rows, (m, c).
            matrices_gce: one matrix per group, (g, c, e).
            counts: number of rows of each group.
            ends_g: index after the last row of each group, (g,) int32.

        Returns:
            (m, e).
        """

    def matrix_gradients(
        self, rows_mc: Tensor, grads_me: Tensor, counts: Sequence[int], ends_g: Tensor, out: Tensor
    ) -> None:
        """Write rowsᵀ · gradients of each group into ``out``, (g, c, e), which may have another dtype."""


class SeparateProducts:
    """One product for each group, or for each run of groups of equal size."""

    def multiply(self, rows_mc: Tensor, matrices_gce: Tensor, counts: Sequence[int], ends_g: Tensor) -> Tensor:
        """Implement `Products.multiply`."""
        result = rows_mc.new_empty(len(rows_mc), matrices_gce.shape[2])
        done = 0
        for group, size, start in _runs(counts):
            done = start.stop
            if group.stop - group.start == 1:
                torch.mm(rows_mc[start], matrices_gce[group.start], out=result[start])
            else:
                stacked = rows_mc[start].unflatten(0, (-1, size))
                torch.bmm(stacked, matrices_gce[group], out=result[start].unflatten(0, (-1, size)))
        result[done:] = 0
        return result

    def matrix_gradients(
        self, rows_mc: Tensor, grads_me: Tensor, counts: Sequence[int], ends_g: Tensor, out: Tensor
    ) -> None:
        """Implement `Products.matrix_gradients`."""
        same = out.dtype == rows_mc.dtype
        for group, size, start in _runs(counts):
            rows, grads = (x[start].unflatten(0, (-1, size)) for x in (rows_mc, grads_me))
            if same:
                torch.bmm(rows.transpose(1, 2), grads, out=out[group])
            else:
                out[group] = torch.bmm(rows.transpose(1, 2), grads)


def _runs(counts: Sequence[int]) -> Iterator[tuple[slice, int, slice]]:
    """Yield each run of groups of equal size: its groups, the size of one group, its rows."""
    group = row = 0
    for size, equal in groupby(counts):
        length = len(list(equal))
        yield slice(group, group + length), size, slice(row, row + length * size)
        group, row = group + length, row + length * size


class GroupedProducts:
    """All groups in one kernel, with torch's grouped product."""

    def multiply(self, rows_mc: Tensor, matrices_gce: Tensor, counts: Sequence[int], ends_g: Tensor) -> Tensor:
        """Implement `Products.multiply`."""
        result = torch.nn.functional.grouped_mm(rows_mc, matrices_gce, offs=ends_g)
        result[sum(counts) :] = 0
        return result

    def matrix_gradients(
        self, rows_mc: Tensor, grads_me: Tensor, counts: Sequence[int], ends_g: Tensor, out: Tensor
    ) -> None:
        """Implement `Products.matrix_gradients`."""
        out.copy_(torch.nn.functional.grouped_mm(rows_mc.t(), grads_me, offs=ends_g))


@lru_cache(maxsize=64)
def choose_products(device: torch.device, dtype: torch.dtype, d_in: int, d_out: int) -> Products:
    """Return torch's grouped product on a GPU where it proves correct, else separate products.

    Args:
        device: device of the rows.
        dtype: dtype of rows and matrices.
        d_in: input width of the matrices.
        d_out: output width of the matrices.
    """
    if (
        device.type == "cuda"
        and hasattr(torch.nn.functional, "grouped_mm")
        and grouped_mm_is_correct(device, dtype, d_in, d_out)
    ):
        return GroupedProducts()
    return SeparateProducts()


def grouped_mm_is_correct(device: torch.device, dtype: torch.dtype, d_in: int, d_out: int) -> bool:
    """True if torch's grouped product supports these operands and agrees with separate products.

    The supported dtypes, widths and GPUs differ between versions of torch, which offers no query for
    them; so a small product is tried.

    Args:
        device: device of the operands.
        dtype: dtype of the operands.
        d_in: input width of the matrices.
        d_out: output width of the matrices.
    """
    counts = (3, 8, 1, 20)
    generator = torch.Generator(device).manual_seed(0)
    rows, grads = (
        torch.randn(sum(counts) + 2, width, generator=generator, device=device).to(dtype) for width in (d_in, d_out)
    )
    matrices = torch.randn(len(counts), d_in, d_out, generator=generator, device=device).to(dtype)
    ends = torch.tensor(counts, device=device).cumsum(0).to(torch.int32)
    found = []
    for products in (GroupedProducts(), SeparateProducts()):
        out = torch.empty_like(matrices)
        try:
            forward = products.multiply(rows, matrices, counts, ends)
            back = products.multiply(grads, matrices.transpose(1, 2), counts, ends)
            products.matrix_gradients(rows, grads, counts, ends, out)
        except (RuntimeError, ValueError):
            return False
        found.append((forward, back, out))
    limit = 8 * torch.finfo(dtype).eps * (d_in + d_out) ** 0.5
    # The standard deviation of a sum of products of standard normal values is the root of their number.
    return all(
        float((ours - theirs).abs().max()) <= limit * max(d_in, d_out, 20) ** 0.5
        for ours, theirs in zip(*found, strict=True)
    )
