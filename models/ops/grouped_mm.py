"""Products of groups of rows, each group with a matrix of its own: in one kernel where torch has one.

`torch.nn.functional.grouped_mm` does all groups at once on a GPU; elsewhere, and for what it does not
take, groups are multiplied one after the other, neighbours of equal size together.

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
    """Rows beyond the last group are zero in results and play no part otherwise."""

    def rows(self, rows_mc: Tensor, matrices_gce: Tensor, counts: Sequence[int], ends_g: Tensor) -> Tensor:
        """Each row times its group's matrix, (m, e)."""

    def matrices(self, rows_mc: Tensor, grads_me: Tensor, counts: Sequence[int], ends_g: Tensor, out: Tensor) -> None:
        """Each group's rowsᵀ · gradients into ``out`` (g, c, e), of whatever dtype."""


class SeparateProducts:
    """A product for each group, or for each run of groups of equal size."""

    def rows(self, rows_mc: Tensor, matrices_gce: Tensor, counts: Sequence[int], ends_g: Tensor) -> Tensor:
        """As `Products.rows`."""
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

    def matrices(self, rows_mc: Tensor, grads_me: Tensor, counts: Sequence[int], ends_g: Tensor, out: Tensor) -> None:
        """As `Products.matrices`."""
        same = out.dtype == rows_mc.dtype
        for group, size, start in _runs(counts):
            rows, grads = (x[start].unflatten(0, (-1, size)) for x in (rows_mc, grads_me))
            if same:
                torch.bmm(rows.transpose(1, 2), grads, out=out[group])
            else:
                out[group] = torch.bmm(rows.transpose(1, 2), grads)


def _runs(counts: Sequence[int]) -> Iterator[tuple[slice, int, slice]]:
    """Runs of groups of equal size: the groups, the size of one, their rows."""
    group = row = 0
    for size, equal in groupby(counts):
        many = len(list(equal))
        yield slice(group, group + many), size, slice(row, row + many * size)
        group, row = group + many, row + many * size


class GroupedProducts:
    """All groups at once, by torch's grouped product."""

    def rows(self, rows_mc: Tensor, matrices_gce: Tensor, counts: Sequence[int], ends_g: Tensor) -> Tensor:
        """As `Products.rows`."""
        result = torch.nn.functional.grouped_mm(rows_mc, matrices_gce, offs=ends_g)
        result[sum(counts) :] = 0
        return result

    def matrices(self, rows_mc: Tensor, grads_me: Tensor, counts: Sequence[int], ends_g: Tensor, out: Tensor) -> None:
        """As `Products.matrices`."""
        out.copy_(torch.nn.functional.grouped_mm(rows_mc.t(), grads_me, offs=ends_g))


@lru_cache(maxsize=64)
def choose_products(device: torch.device, dtype: torch.dtype, d_in: int, d_out: int) -> Products:
    """The way that this device takes such products: the grouped one on a GPU where it proves right.

    Args:
        device: where the rows lie.
        dtype: of rows and matrices.
        d_in, d_out: widths of the matrices.
    """
    if (
        device.type == "cuda"
        and hasattr(torch.nn.functional, "grouped_mm")
        and grouped_is_right(device, dtype, d_in, d_out)
    ):
        return GroupedProducts()
    return SeparateProducts()


def grouped_is_right(device: torch.device, dtype: torch.dtype, d_in: int, d_out: int) -> bool:
    """Whether torch's grouped product takes such operands and agrees with separate ones.

    Which dtypes, widths and cards it serves differs from version to version, and is not to be asked.
    """
    counts = (3, 8, 1, 20)
    generator = torch.Generator(device).manual_seed(0)
    rows, grads = (
        torch.randn(sum(counts) + 2, width, generator=generator, device=device).to(dtype) for width in (d_in, d_out)
    )
    matrices = torch.randn(len(counts), d_in, d_out, generator=generator, device=device).to(dtype)
    ends = torch.tensor(counts, device=device).cumsum(0).to(torch.int32)
    found = []
    for way in (GroupedProducts(), SeparateProducts()):
        out = torch.empty_like(matrices)
        try:
            forward = way.rows(rows, matrices, counts, ends)
            back = way.rows(grads, matrices.transpose(1, 2), counts, ends)
            way.matrices(rows, grads, counts, ends, out)
        except (RuntimeError, ValueError):
            return False
        found.append((forward, back, out))
    limit = 8 * torch.finfo(dtype).eps * (d_in + d_out) ** 0.5
    # Sums of products of standard normal values: their deviation is the root of their number.
    return all(
        float((ours - theirs).abs().max()) <= limit * max(d_in, d_out, 20) ** 0.5
        for ours, theirs in zip(*found, strict=True)
    )
