"""Fake compute: matrix products and random values are zeros; every tensor is allocated as usual.

Matrix products take almost all the time of a training step, and a rehearsal does not need their values. With zero
weights and zero products, all other values stay finite.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_aten = torch.ops.aten

Shape = tuple[int, ...]


def _product(left: Tensor, right: Tensor) -> Shape:
    """Shape of (…, m, k) times (…, k, n)."""
    return (*left.shape[:-1], right.shape[-1])


def _grouped(left: Tensor, right: Tensor, ends: Tensor | None) -> Shape:
    """Shape of torch's grouped product: the rows, or with two matrices the columns, are split into groups."""
    if left.ndim == right.ndim == 2:
        assert ends is not None
        return (len(ends), left.shape[0], right.shape[1])
    rows = left.shape[-2]
    return (rows, right.shape[-1]) if left.ndim == 2 else (left.shape[0], rows, right.shape[-1])


def _new_product(left: Tensor, right: Tensor, *_: Any, **__: Any) -> Tensor:
    return left.new_zeros(_product(left, right))


def _new_sum(_: Tensor, left: Tensor, right: Tensor, **__: Any) -> Tensor:
    return left.new_zeros(_product(left, right))


def _new_grouped(left: Tensor, right: Tensor, offs: Tensor | None = None, *_: Any, **__: Any) -> Tensor:
    return left.new_zeros(_grouped(left, right, offs))


def _zero_out(*_: Any, out: Tensor, **__: Any) -> Tensor:
    return out.zero_()


def _zero_self(target: Tensor, *_: Any, **__: Any) -> Tensor:
    return target.zero_()


def _new_widened_sum(
    x: Tensor, dims: list[int] | None, keepdim: bool = False, *, dtype: torch.dtype | None = None
) -> Tensor:
    if dtype in (None, x.dtype) or not dims:
        same: Tensor = _aten.sum.dim_IntList(x, dims, keepdim, dtype=dtype)
        return same
    summed = {dim % x.ndim for dim in dims}
    shape = [1 if n in summed else size for n, size in enumerate(x.shape) if keepdim or n not in summed]
    return x.new_zeros(shape, dtype=dtype)


def _replacements() -> dict[Any, Callable[..., Tensor]]:
    found: dict[Any, Callable[..., Tensor]] = {
        _aten.mm.default: _new_product,
        _aten.bmm.default: _new_product,
        _aten.addmm.default: _new_sum,
        _aten.baddbmm.default: _new_sum,
    }
    found |= dict.fromkeys((_aten.mm.out, _aten.bmm.out, _aten.addmm.out, _aten.baddbmm.out), _zero_out)
    found |= dict.fromkeys(
        (_aten.addmm_.default, _aten.baddbmm_.default, _aten.uniform_.default, _aten.normal_.default), _zero_self
    )
    if hasattr(_aten, "_grouped_mm"):
        found[_aten._grouped_mm.default] = _new_grouped
    return found


class FakeCompute(TorchDispatchMode):
    """While it is active, matrix products and random values are zeros, allocated as torch allocates them.

    The scratch memory of CPU kernels within a product is not allocated.

    Args:
        like_gpu: to sum values in a wider dtype allocates nothing but the sums, as on a GPU: a CPU widens all values
            first.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # To be left out of what torch's compiler makes, the first operation would import it; nothing is compiled.
        return False

    def __init__(self, *, like_gpu: bool = False) -> None:
        super().__init__()
        self._replacements = _replacements()
        if like_gpu:
            self._replacements[_aten.sum.dim_IntList] = _new_widened_sum

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Called by torch for every operation."""
        return self._replacements.get(func, func)(*args, **(kwargs or {}))
