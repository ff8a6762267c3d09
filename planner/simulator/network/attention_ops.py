"""Simulation of torch's fused attention and of rotary embedding.

Source: events of torch 2.13's allocator, operation by operation.
"""

from __future__ import annotations

from ...config.geometry import RelationGeometry
from ..core import Gradients, Storage, Tape, Tensor
from .ops import GRADIENTS, INDEX_BYTES, TEMPORARY, DtypeSizes


def missing_pairs_bytes(geometry: RelationGeometry) -> int:
    """Return the peak of making the mask of the pairs that do not exist (models/ops/context.py, `missing_pairs`).

    Steps along an axis are int64; the mask and a comparison are bool.
    """
    return 10 * geometry.patches**2


def relation_index_bytes(geometry: RelationGeometry) -> int:
    """Return the peak of computing the relation of every pair (models/ops/context.py, `relation_index`).

    The index and the steps along an axis are int64; then the index gets the class token's row and column, and the
    mask of missing pairs is made.
    """
    index = INDEX_BYTES * geometry.patches**2
    padded = INDEX_BYTES * geometry.tokens**2
    return max(index + padded, 0 if geometry.complete else padded + missing_pairs_bytes(geometry))


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


def fused_attention(
    tape: Tape,
    rows: list[Tensor],
    batch: int,
    tokens: int,
    heads: int,
    head_dim: int,
    sizes: DtypeSizes,
    kv_heads: int | None = None,
    *,
    mask_of: RelationGeometry | None = None,
) -> Tensor:
    """Run queries, keys and values through one fused kernel; saves them, the output, a logsumexp per row and the mask.

    Args:
        tape, sizes: as in `linear`.
        rows: queries, keys and values, each with its own storage or as parts of one storage.
        batch, tokens, heads, head_dim: shape of the queries.
        kv_heads: heads of keys and values; None is ``heads``.
        mask_of: the geometry whose missing pairs the kernel must be told, in a mask that torch converts to the rows'
            dtype; None if it needs no mask.
    """
    mask = []
    if mask_of is not None:
        tape.new(missing_pairs_bytes(mask_of), TEMPORARY)
        exists = tape.new(tokens**2, TEMPORARY)
        mask = [tape.new(tokens**2 * sizes.value)]
    head = batch * tokens * head_dim * sizes.value
    shared = heads if kv_heads is None else kv_heads
    out = tape.new(heads * head)
    sums = tape.new(batch * heads * tokens * sizes.accumulator)
    block = flash_block_bytes(tokens, head_dim, sizes)
    tape.new(block, TEMPORARY)

    def backward(grad: Storage) -> Gradients:
        grads = [tape.new(heads * head, GRADIENTS), *(tape.new(shared * head, GRADIENTS) for _ in range(2))]
        # A GPU's kernel makes the gradients of shared keys and values for every head of queries, then adds them up.
        spread = 2 * heads * head if sizes.device != "cpu" and shared < heads else 0
        tape.new(2 * block + spread, TEMPORARY)
        return grads

    result = tape.result(out, rows, backward, (*(row.storage for row in rows), out, sums, *mask))
    if mask_of is not None:
        del exists  # The layer's mask lives until the kernel has run.
    return result
