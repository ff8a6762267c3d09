"""Triton kernels of logits and values, and what all kernels share. Only this module and gradient_kernels import triton.

The rows of a relation are its pairs in all samples: row ``m`` belongs to pair ``m // batch`` and sample
``m % batch``. A program takes a block of at most ``BLOCK_M`` rows, read from a list (block, 4) of int32: relation
within the tile, first row, number of rows of the relation, first pair of the relation in the lists of query and key
tokens.

The columns of a program are ``HP`` heads of ``DP`` columns each, ``DP`` a power of two of at least ``D``. Columns
of no head read zeros, so widths need not be a power of two.

Products have fp32 accumulators. Addresses of rows and matrices are 64-bit: a table may have over 2³¹ elements.

Legend of arrays: sources (b, n, c) or (b, n, e), tables and their gradients (k, c, e), logits and weights
(b, h, n, n), with b samples, n tokens, k relations of a tile, c = C, h = HEADS, e = HEADS·D.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def block_rows(block_ptr, first, queries_ptr, keys_ptr, batch, BLOCK_M: tl.constexpr):
    """Rows ``first`` to ``first + BLOCK_M − 1`` of a block's relation.

    Returns:
        Their numbers, which of them exist, and their sample, query token and key token, int32.
    """
    m = first + tl.arange(0, BLOCK_M)
    exists = m < tl.load(block_ptr + 2)
    pair = tl.load(block_ptr + 3) + m // batch
    query = tl.load(queries_ptr + pair, mask=exists, other=0)
    key = tl.load(keys_ptr + pair, mask=exists, other=0)
    return m, exists, m % batch, query, key


@triton.jit
def head_columns(group, HEADS: tl.constexpr, D: tl.constexpr, HP: tl.constexpr, DP: tl.constexpr):
    """Heads (HP,) of a group, and columns (HP·DP,) of the heads in a matrix with which of them exist."""
    heads = group * HP + tl.arange(0, HP)
    column = tl.arange(0, HP * DP)
    head, within = group * HP + column // DP, column % DP
    return heads, head * D + within, (head < HEADS) & (within < D)


@triton.jit
def pair_offsets(sample, query, key, heads, tokens, HEADS: tl.constexpr):
    """Offsets (BLOCK_M, HP) of pairs in (b, h, n, n)."""
    within = (query * tokens + key)[:, None] + heads[None, :].to(tl.int64) * tokens * tokens
    return sample[:, None].to(tl.int64) * HEADS * tokens * tokens + within


@triton.jit
def pair_factors(
    source_ptr,
    sample,
    query,
    key,
    exists,
    heads,
    tokens,
    HEADS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    HP: tl.constexpr,
    DP: tl.constexpr,
):
    """Values of pairs in (b, h, n, n), each repeated for the columns of its head, (BLOCK_M, HP·DP) in fp32."""
    values = tl.load(
        source_ptr + pair_offsets(sample, query, key, heads, tokens, HEADS),
        mask=exists[:, None] & (heads < HEADS)[None, :],
        other=0.0,
    ).to(tl.float32)
    return tl.reshape(tl.broadcast_to(values[:, :, None], (BLOCK_M, HP, DP)), (BLOCK_M, HP * DP))


@triton.jit
def add_product(a, b, total, PRECISION: tl.constexpr):
    """Add a·b to a total in fp32. "upcast" is for the interpreter, which multiplies bf16 as integers."""
    if PRECISION == "upcast":
        return tl.dot(a.to(tl.float32), b.to(tl.float32), total, input_precision="ieee")
    else:
        return tl.dot(a, b, total, input_precision=PRECISION)


@triton.jit
def project_rows(
    rows_ptr,
    table_ptr,
    rows,
    exists,
    columns,
    in_heads,
    C: tl.constexpr,
    E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    COLUMNS: tl.constexpr,
    HAS_TABLE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Rows times a relation's matrix, (BLOCK_M, COLUMNS) in fp32; the rows themselves without a table."""
    if HAS_TABLE:
        projected = tl.zeros((BLOCK_M, COLUMNS), tl.float32)
        for begin in range(0, C, BLOCK_C):
            c = begin + tl.arange(0, BLOCK_C)
            x = tl.load(rows_ptr + rows[:, None].to(tl.int64) * C + c[None, :], mask=exists[:, None] & (c < C)[None, :], other=0.0)
            matrix = tl.load(
                table_ptr + c[:, None] * E + columns[None, :], mask=(c < C)[:, None] & in_heads[None, :], other=0.0
            )
            projected = add_product(x, matrix.to(x.dtype), projected, PRECISION)
    else:
        projected = tl.load(
            rows_ptr + rows[:, None].to(tl.int64) * E + columns[None, :],
            mask=exists[:, None] & in_heads[None, :],
            other=0.0,
        ).to(tl.float32)
    return projected


@triton.jit
def add_to(target_ptr, offsets, values, mask, ATOMIC: tl.constexpr):
    """Add values to fp32 memory; without atomics no other program may write to the same place."""
    if ATOMIC:
        tl.atomic_add(target_ptr + offsets, values, mask=mask, sem="relaxed")
    else:
        before = tl.load(target_ptr + offsets, mask=mask, other=0.0)
        tl.store(target_ptr + offsets, before + values, mask=mask)


@triton.jit(do_not_specialize=["start"])
def logits_kernel(
    logits_ptr,
    query_ptr,
    key_ptr,
    query_table_ptr,
    key_table_ptr,
    blocks_ptr,
    queries_ptr,
    keys_ptr,
    start,
    batch,
    tokens,
    C: tl.constexpr,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    QUERY_TABLE: tl.constexpr,
    KEY_TABLE: tl.constexpr,
    ADD: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    HP: tl.constexpr,
    DP: tl.constexpr,
):
    """Write, or add, Σ_d q·k of each pair and head; every position is written by one program."""
    GROUPS: tl.constexpr = (HEADS + HP - 1) // HP
    E: tl.constexpr = HEADS * D
    block_ptr = blocks_ptr + (start + tl.program_id(0) // GROUPS) * 4
    _, exists, sample, query, key = block_rows(block_ptr, tl.load(block_ptr + 1), queries_ptr, keys_ptr, batch, BLOCK_M)
    heads, columns, in_heads = head_columns(tl.program_id(0) % GROUPS, HEADS, D, HP, DP)
    matrix = tl.load(block_ptr).to(tl.int64) * (C * E)
    q = project_rows(
        query_ptr, query_table_ptr + matrix, sample * tokens + query, exists, columns, in_heads,
        C, E, BLOCK_M, BLOCK_C, HP * DP, QUERY_TABLE, PRECISION,
    ).to(query_ptr.dtype.element_ty)  # fmt: skip
    k = project_rows(
        key_ptr, key_table_ptr + matrix, sample * tokens + key, exists, columns, in_heads,
        C, E, BLOCK_M, BLOCK_C, HP * DP, KEY_TABLE, PRECISION,
    )  # fmt: skip
    values = tl.sum(tl.reshape(q.to(tl.float32) * k, (BLOCK_M, HP, DP)), axis=2)
    target = logits_ptr + pair_offsets(sample, query, key, heads, tokens, HEADS)
    mask = exists[:, None] & (heads < HEADS)[None, :]
    if ADD:
        values += tl.load(target, mask=mask, other=0.0)
    tl.store(target, values, mask=mask)


@triton.jit(do_not_specialize=["start"])
def values_kernel(
    out_ptr,
    value_ptr,
    table_ptr,
    weights_ptr,
    blocks_ptr,
    queries_ptr,
    keys_ptr,
    start,
    batch,
    tokens,
    C: tl.constexpr,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    ATOMIC: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    HP: tl.constexpr,
    DP: tl.constexpr,
):
    """Add the projected values times the attention weights to the rows (b, n, e) of the queries, in fp32."""
    GROUPS: tl.constexpr = (HEADS + HP - 1) // HP
    E: tl.constexpr = HEADS * D
    block_ptr = blocks_ptr + (start + tl.program_id(0) // GROUPS) * 4
    _, exists, sample, query, key = block_rows(block_ptr, tl.load(block_ptr + 1), queries_ptr, keys_ptr, batch, BLOCK_M)
    heads, columns, in_heads = head_columns(tl.program_id(0) % GROUPS, HEADS, D, HP, DP)
    matrix = tl.load(block_ptr).to(tl.int64) * (C * E)
    v = project_rows(
        value_ptr, table_ptr + matrix, sample * tokens + key, exists, columns, in_heads,
        C, E, BLOCK_M, BLOCK_C, HP * DP, True, PRECISION,
    )  # fmt: skip
    v *= pair_factors(weights_ptr, sample, query, key, exists, heads, tokens, HEADS, BLOCK_M, HP, DP)
    target = (sample * tokens + query)[:, None].to(tl.int64) * E + columns[None, :]
    add_to(out_ptr, target, v, exists[:, None] & in_heads[None, :], ATOMIC)
