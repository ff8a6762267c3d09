"""Simulation of the norms: what each allocates, saves and frees in forward and backward.

Source: events of torch 2.13's allocator. A GPU has a kernel for either norm; a CPU computes RMSNorm operation by
operation (aten/src/ATen/native/layer_norm.cpp, `rms_norm_composite`).
"""

from __future__ import annotations

from dataclasses import replace

from ...config.model import ModelSpec
from ..core import Gradients, ModuleParams, Storage, Tape, Tensor
from .ops import GRADIENTS, TEMPORARY, WEIGHT_GRADIENTS, DtypeSizes, accumulate_gradients, cast, weight_gradients


def layer_norm(
    tape: Tape,
    x: Tensor,
    rows: int,
    width: int,
    weights: ModuleParams,
    sizes: DtypeSizes,
    *,
    copies: int = 0,
    statistics: int = 2,
) -> Tensor:
    """Apply a norm to (rows, width) in one kernel; saves its input, and the statistics of each row.

    Args:
        tape, x, weights, sizes: as in `linear`.
        rows, width: shape of the input.
        copies: bytes of a contiguous copy of the gradient; 0 unless the gradient is a view of a larger tensor.
        statistics: statistics of a row: mean and deviation of LayerNorm, the deviation of RMSNorm.
    """
    tape.hooks.fetch(weights, backward=False)
    out = tape.new(rows * width * sizes.value)
    saved = (x.storage, tape.new(statistics * rows * sizes.statistic), *tape.kept_weights(weights))
    tape.hooks.release(weights, backward=False)
    wanted = x.node is not None

    def backward(grad: Storage) -> Gradients:
        tape.hooks.fetch(weights, backward=True)
        given = tape.new(rows * width * sizes.value, GRADIENTS) if wanted else None
        copy = tape.new(copies, TEMPORARY)
        block = tape.new(statistics * sizes.threads * width * sizes.accumulator, TEMPORARY)
        accumulate_gradients(
            tape, weights, [tape.new(numel * sizes.parameter, WEIGHT_GRADIENTS) for numel in weights.numels]
        )
        del copy, block
        return (given,)

    return tape.result(out, (x,), backward, saved)


def norm(
    tape: Tape,
    x: Tensor,
    rows: int,
    width: int,
    weights: ModuleParams,
    sizes: DtypeSizes,
    spec: ModelSpec,
    *,
    copies: int = 0,
) -> Tensor:
    """Apply the norm of a spec to (rows, width).

    Args:
        tape, x, rows, width, weights, sizes, copies: as in `layer_norm`.
        spec: the model.
    """
    if spec.norm == "layer":
        return layer_norm(tape, x, rows, width, weights, sizes, copies=copies)
    if sizes.device == "cpu":
        return _rms_norm_cpu(tape, x, rows, width, weights, sizes)
    return layer_norm(tape, x, rows, width, weights, sizes, copies=copies, statistics=1)


def _rms_norm_cpu(tape: Tape, x: Tensor, rows: int, width: int, weights: ModuleParams, sizes: DtypeSizes) -> Tensor:
    """Divide rows by their root mean square, in fp32 at least, and multiply them by the weight: a node for each."""
    wide = replace(sizes, value=sizes.accumulator)
    full, column = rows * width * wide.value, rows * wide.value
    wanted = x.node is not None
    tape.hooks.fetch(weights, backward=False)
    x = cast(tape, x, rows * width, sizes, wide)
    squares, deviations = tape.new(full, TEMPORARY), tape.new(column)
    tape.new(column, TEMPORARY)
    del squares

    def square_backward(grad: Storage) -> Gradients:
        pieces = [tape.new(full, GRADIENTS) for _ in range(3)]
        tape.hooks.release(weights, backward=True)
        return (pieces.pop(),)

    def inverse_backward(grad: Storage) -> Gradients:
        return (tape.new(full, GRADIENTS) if wanted else None,)

    def divide_backward(grad: Storage) -> Gradients:
        given = tape.new(full, GRADIENTS) if wanted else None
        product = tape.new(full, TEMPORARY)
        column_grad = tape.new(column, GRADIENTS)
        del product
        return (given, column_grad)

    squared = tape.result(tape.new(0), (x,), square_backward, (x.storage,) if wanted else ())
    inverse = tape.result(deviations, (squared,), inverse_backward, (deviations,) if wanted else ())
    normed = tape.result(tape.new(full), (x, inverse), divide_backward, (x.storage, deviations) if wanted else ())
    del squared, inverse, deviations

    def scale_backward(grad: Storage) -> Gradients:
        tape.hooks.fetch(weights, backward=True)
        inner, product = tape.new(full, GRADIENTS), tape.new(full, TEMPORARY)
        weight_gradients(tape, weights, sizes.parameter)
        del product
        if not wanted:
            tape.hooks.release(weights, backward=True)
        return (inner,)

    out = tape.result(tape.new(full), (normed,), scale_backward, (normed.storage, *tape.kept_weights(weights)))
    del normed, x
    out = cast(tape, out, rows * width, wide, sizes)
    tape.hooks.release(weights, backward=False)
    return out
