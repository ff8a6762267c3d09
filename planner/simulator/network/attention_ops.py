"""Twins of attention's own operations: the fused kernel, rotary embedding, a matrix per position.

Source: torch 2.13, its allocator's events; models/attention.py, models/rotary.py.
"""

from __future__ import annotations

from ..core.autograd import Gradients, Tape, Tensor, Weights
from ..core.storage import Storage
from .ops import GRADIENTS, TEMPORARY, Widths, cast, cast_parameters, weight_gradients


def flash_block_bytes(tokens: int, head_dim: int, w: Widths) -> int:
    """Scratch of fused attention on a CPU: per thread a block of scores, two rows and an output block.

    Source: torch 2.13, aten/src/ATen/native/cpu/FlashAttentionKernel.cpp.
    """
    if w.device != "cpu":
        return 0
    queries = min(tokens, 256 if tokens >= 768 else 64 if tokens >= 192 else 32)
    keys = min(tokens, 512)
    block = (queries * keys + 2 * queries + queries * head_dim) * w.accumulator
    return w.threads * (block + (queries * keys * w.value if w.value < w.accumulator else 0))


def rotate(tape: Tape, x: Tensor, numel: int, w: Widths) -> Tensor:
    """Queries or keys turned by rotary embedding, whose angles are as wide as parameters; nothing is kept."""
    size, wide = numel * w.value, numel * w.parameter
    halves, joined = tape.new(wide, TEMPORARY), tape.new(wide)
    out = tape.new(size) if w.casts else joined
    del halves, joined

    def backward(grad: Storage) -> Gradients:
        tape.new((3 if w.casts else 2) * wide, TEMPORARY)
        return (tape.new(size, GRADIENTS),)

    return tape.result(out, (x,), backward)


def positions(
    tape: Tape, x: Tensor, batch: int, d_in: int, d_out: int, tiles: list[tuple[int, Weights]], w: Widths, given: Widths
) -> Tensor:
    """Every token times its position's matrix, tile by tile, joined into one tensor; keeps its input.

    Args:
        tape, x, d_in, d_out, w: as in `linear`.
        batch: samples.
        tiles: positions and parameters of each tile.
        given: widths of x.
    """
    total = batch * sum(count for count, _ in tiles)
    parts = []
    for count, weights in tiles:
        part = x if len(tiles) == 1 else _slice(tape, x, total * d_in * given.value)
        parts.append(_position_tile(tape, part, batch * count, d_in, d_out, weights, w, given))
        del part
    return tape.result(tape.new(total * d_out * w.value), parts, lambda grad: [grad] * len(tiles))


def _slice(tape: Tape, x: Tensor, size: int) -> Tensor:
    """A view of some rows, whose gradient is as large as the whole input, nought elsewhere."""
    return tape.result(x.storage, (x,), lambda grad: (tape.new(size, GRADIENTS),))


def _position_tile(
    tape: Tape, x: Tensor, rows: int, d_in: int, d_out: int, weights: Weights, w: Widths, given: Widths
) -> Tensor:
    tape.policy.fetch(weights, backward=False)
    casts = cast_parameters(tape, weights, w)
    x = cast(tape, x, rows * d_in, given, w)
    out = tape.new(rows * d_out * w.value)
    tape.policy.release(weights, backward=False)

    def backward(grad: Storage) -> Gradients:
        tape.policy.fetch(weights, backward=True)
        part = tape.new(rows * d_in * w.value, GRADIENTS)
        if casts_back:
            tape.policy.release(weights, backward=True)
            return (part, tape.new(weights.numels[0] * w.value, GRADIENTS))
        weight_gradients(tape, weights, w.parameter)
        tape.policy.release(weights, backward=True)
        return (part,)

    casts_back = len(casts)
    return tape.result(out, (x, *casts), backward, (x.storage, *(copy.storage for copy in casts)))


def fused_attention(
    tape: Tape, rows: list[Tensor], batch: int, tokens: int, heads: int, head_dim: int, w: Widths
) -> Tensor:
    """Queries, keys and values through one fused kernel; keeps them, the output and a sum per row.

    Args:
        tape, w: as in `linear`.
        rows: queries, keys and values, each of its own or as parts of one storage.
        batch, tokens, heads, head_dim: sizes.
    """
    one = batch * tokens * heads * head_dim * w.value
    out = tape.new(one)
    sums = tape.new(batch * heads * tokens * w.accumulator)
    block = flash_block_bytes(tokens, head_dim, w)
    tape.new(block, TEMPORARY)
    count = len(rows)

    def backward(grad: Storage) -> Gradients:
        grads = [tape.new(one, GRADIENTS) for _ in range(count)]
        tape.new(2 * block, TEMPORARY)
        return grads

    return tape.result(out, rows, backward, (*(row.storage for row in rows), out, sums))
