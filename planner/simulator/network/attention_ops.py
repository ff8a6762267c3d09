"""Simulation of attention's operations: the fused kernel, rotary embedding, a matrix per position.

Source: events of torch 2.13's allocator; models/layers/attention.py, models/ops/rotary.py.
"""

from __future__ import annotations

from ..core import Gradients, ModuleParams, Storage, Tape, Tensor
from .ops import GRADIENTS, TEMPORARY, DtypeSizes, cast, cast_parameters, weight_gradients


def flash_block_bytes(tokens: int, head_dim: int, sizes: DtypeSizes) -> int:
    """Return the scratch bytes of fused attention on a CPU: per thread a block of scores, two rows, an output block.

    Source: torch 2.13, aten/src/ATen/native/cpu/FlashAttentionKernel.cpp.
    """
    if sizes.device != "cpu":
        return 0
    queries = min(tokens, 256 if tokens >= 768 else 64 if tokens >= 192 else 32)
    keys = min(tokens, 512)
    block = (queries * keys + 2 * queries + queries * head_dim) * sizes.accumulator
    return sizes.threads * (block + (queries * keys * sizes.value if sizes.value < sizes.accumulator else 0))


def rotate(tape: Tape, x: Tensor, numel: int, sizes: DtypeSizes) -> Tensor:
    """Rotate queries or keys by rotary embedding, in the parameter dtype; nothing is saved for backward."""
    size, wide = numel * sizes.value, numel * sizes.parameter
    halves, joined = tape.new(wide, TEMPORARY), tape.new(wide)
    out = tape.new(size) if sizes.casts else joined
    del halves, joined

    def backward(grad: Storage) -> Gradients:
        tape.new((3 if sizes.casts else 2) * wide, TEMPORARY)
        return (tape.new(size, GRADIENTS),)

    return tape.result(out, (x,), backward)


def positions(
    tape: Tape,
    x: Tensor,
    batch: int,
    d_in: int,
    d_out: int,
    tiles: list[tuple[int, ModuleParams]],
    sizes: DtypeSizes,
    given: DtypeSizes,
) -> Tensor:
    """Multiply every token by the matrix of its position, tile by tile, and join the results; saves its input.

    Args:
        tape, x, d_in, d_out, sizes: as in `linear`.
        batch: samples of the micro-batch.
        tiles: number of positions and parameters of each tile.
        given: sizes of x.
    """
    total = batch * sum(count for count, _ in tiles)
    parts = []
    for count, weights in tiles:
        part = x if len(tiles) == 1 else _slice(tape, x, total * d_in * given.value)
        parts.append(_position_tile(tape, part, batch * count, d_in, d_out, weights, sizes, given))
        del part
    return tape.result(tape.new(total * d_out * sizes.value), parts, lambda grad: [grad] * len(tiles))


def _slice(tape: Tape, x: Tensor, size: int) -> Tensor:
    """Return a view of some rows; its gradient has the size of the full input and is zero elsewhere."""
    return tape.result(x.storage, (x,), lambda grad: (tape.new(size, GRADIENTS),))


def _position_tile(
    tape: Tape, x: Tensor, rows: int, d_in: int, d_out: int, weights: ModuleParams, sizes: DtypeSizes, given: DtypeSizes
) -> Tensor:
    tape.hooks.fetch(weights, backward=False)
    casts = cast_parameters(tape, weights, sizes)
    x = cast(tape, x, rows * d_in, given, sizes)
    out = tape.new(rows * d_out * sizes.value)
    tape.hooks.release(weights, backward=False)

    def backward(grad: Storage) -> Gradients:
        tape.hooks.fetch(weights, backward=True)
        part = tape.new(rows * d_in * sizes.value, GRADIENTS)
        if casts_back:
            tape.hooks.release(weights, backward=True)
            return (part, tape.new(weights.numels[0] * sizes.value, GRADIENTS))
        weight_gradients(tape, weights, sizes.parameter)
        tape.hooks.release(weights, backward=True)
        return (part,)

    casts_back = len(casts)
    return tape.result(out, (x, *casts), backward, (x.storage, *(copy.storage for copy in casts)))


def fused_attention(
    tape: Tape, rows: list[Tensor], batch: int, tokens: int, heads: int, head_dim: int, sizes: DtypeSizes
) -> Tensor:
    """Run queries, keys and values through one fused kernel; saves them, the output and a logsumexp per row.

    Args:
        tape, sizes: as in `linear`.
        rows: queries, keys and values, each with its own storage or as parts of one storage.
        batch, tokens, heads, head_dim: shape of each of them.
    """
    one = batch * tokens * heads * head_dim * sizes.value
    out = tape.new(one)
    sums = tape.new(batch * heads * tokens * sizes.accumulator)
    block = flash_block_bytes(tokens, head_dim, sizes)
    tape.new(block, TEMPORARY)
    count = len(rows)

    def backward(grad: Storage) -> Gradients:
        grads = [tape.new(one, GRADIENTS) for _ in range(count)]
        tape.new(2 * block, TEMPORARY)
        return grads

    return tape.result(out, rows, backward, (*(row.storage for row in rows), out, sums))
