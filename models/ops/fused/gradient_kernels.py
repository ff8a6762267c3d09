"""Triton kernels of backward. Rows, columns and arrays are those of kernels.py.

Backward of a projection takes two products: rowsᵀ · gradients for the matrix, gradients · matrixᵀ for the rows. The
gradients of projected rows are read from scratch memory.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .kernels import add_product, add_to, block_rows, head_columns, pair_factors, project_rows


@triton.jit(do_not_specialize=["start", "first_row"])
def projected_gradients_kernel(
    query_grads_ptr,
    key_grads_ptr,
    grad_logits_ptr,
    query_ptr,
    key_ptr,
    query_table_ptr,
    key_table_ptr,
    blocks_ptr,
    queries_ptr,
    keys_ptr,
    start,
    first_row,
    batch,
    tokens,
    C: tl.constexpr,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    QUERY_TABLE: tl.constexpr,
    KEY_TABLE: tl.constexpr,
    QUERY_GRADS: tl.constexpr,
    KEY_GRADS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    HP: tl.constexpr,
    DP: tl.constexpr,
):
    """Write the gradients of projected queries and keys, dl·k and dl·q, as rows (rows of a chunk, e).

    ``first_row`` is the number of the chunk's first row among the rows of all relations.
    """
    GROUPS: tl.constexpr = (HEADS + HP - 1) // HP
    E: tl.constexpr = HEADS * D
    block_ptr = blocks_ptr + (start + tl.program_id(0) // GROUPS) * 4
    m, exists, sample, query, key = block_rows(block_ptr, tl.load(block_ptr + 1), queries_ptr, keys_ptr, batch, BLOCK_M)
    heads, columns, in_heads = head_columns(tl.program_id(0) % GROUPS, HEADS, D, HP, DP)
    matrix = tl.load(block_ptr).to(tl.int64) * (C * E)
    grad = pair_factors(grad_logits_ptr, sample, query, key, exists, heads, tokens, HEADS, BLOCK_M, HP, DP)
    target = (tl.load(block_ptr + 3).to(tl.int64) * batch - first_row + m)[:, None] * E + columns[None, :]
    mask = exists[:, None] & in_heads[None, :]
    if QUERY_GRADS:
        k = project_rows(
            key_ptr, key_table_ptr + matrix, sample * tokens + key, exists, columns, in_heads,
            C, E, BLOCK_M, BLOCK_C, HP * DP, KEY_TABLE, PRECISION,
        )  # fmt: skip
        tl.store(query_grads_ptr + target, (grad * k).to(query_grads_ptr.dtype.element_ty), mask=mask)
    if KEY_GRADS:
        q = project_rows(
            query_ptr, query_table_ptr + matrix, sample * tokens + query, exists, columns, in_heads,
            C, E, BLOCK_M, BLOCK_C, HP * DP, QUERY_TABLE, PRECISION,
        )  # fmt: skip
        tl.store(key_grads_ptr + target, (grad * q).to(key_grads_ptr.dtype.element_ty), mask=mask)


@triton.jit
def gradient_rows(
    grads_ptr,
    first_row,
    block_ptr,
    m,
    exists,
    group,
    batch,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    HP: tl.constexpr,
    DP: tl.constexpr,
):
    """Gradients of a block's projected rows for a group of heads, (BLOCK_M, HP·DP), from a chunk's rows."""
    _, columns, in_heads = head_columns(group, HEADS, D, HP, DP)
    rows = tl.load(block_ptr + 3).to(tl.int64) * batch - first_row + m
    mask = exists[:, None] & in_heads[None, :]
    return tl.load(grads_ptr + rows[:, None] * (HEADS * D) + columns[None, :], mask=mask, other=0.0)


@triton.jit
def source_rows(tokens_ptr, pair, sample, exists, tokens):
    """Rows (BLOCK_M,) of a source (b·n, c) that pairs in samples read, 64-bit.

    ``tokens_ptr`` is the list of query or of key tokens.
    """
    return (sample * tokens + tl.load(tokens_ptr + pair, mask=exists, other=0)).to(tl.int64)


@triton.jit
def next_rows(pair, sample, batch, BLOCK_M: tl.constexpr):
    """Pairs and samples of the rows ``BLOCK_M`` later."""
    sample += BLOCK_M % batch
    over = sample >= batch
    return pair + BLOCK_M // batch + over.to(tl.int32), tl.where(over, sample - batch, sample)


@triton.jit(do_not_specialize=["start", "first_row"])
def matrix_gradients_kernel(
    table_grads_ptr,
    rows_ptr,
    grads_ptr,
    blocks_ptr,
    queries_ptr,
    keys_ptr,
    start,
    first_row,
    batch,
    tokens,
    C: tl.constexpr,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    BY_QUERY: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    HP: tl.constexpr,
    DP: tl.constexpr,
):
    """Write a block (BLOCK_C, HP·DP) of the gradient of one relation's matrix: rowsᵀ · gradients, all rows in order.

    A block of the list is a whole relation here.
    """
    GROUPS: tl.constexpr = (HEADS + HP - 1) // HP
    C_BLOCKS: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    E: tl.constexpr = HEADS * D
    group = tl.program_id(0) % GROUPS
    c = (tl.program_id(0) // GROUPS) % C_BLOCKS * BLOCK_C + tl.arange(0, BLOCK_C)
    block_ptr = blocks_ptr + (start + tl.program_id(0) // (GROUPS * C_BLOCKS)) * 4
    count, first_pair = tl.load(block_ptr + 2), tl.load(block_ptr + 3)
    tokens_ptr = queries_ptr if BY_QUERY else keys_ptr
    _, columns, in_heads = head_columns(group, HEADS, D, HP, DP)
    within = tl.arange(0, BLOCK_M)
    pair, sample = first_pair + within // batch, within % batch
    grads_at = grads_ptr + (first_pair.to(tl.int64) * batch - first_row + within)[:, None] * E + columns[None, :]
    rows = source_rows(tokens_ptr, pair, sample, within < count, tokens)
    total = tl.zeros((BLOCK_C, HP * DP), tl.float32)
    for begin in range(0, count, BLOCK_M):
        exists = begin + within < count
        x = tl.load(rows_ptr + rows[:, None] * C + c[None, :], mask=exists[:, None] & (c < C)[None, :], other=0.0)
        grads = tl.load(grads_at, mask=exists[:, None] & in_heads[None, :], other=0.0)
        # The next rows are found here, not where they are read: loads that wait for another load of their own
        # iteration start one iteration before the product, others two. Adding a step needs no division.
        pair, sample = next_rows(pair, sample, batch, BLOCK_M)
        rows = source_rows(tokens_ptr, pair, sample, begin + BLOCK_M + within < count, tokens)
        grads_at += BLOCK_M * E
        total = add_product(tl.trans(x), grads, total, PRECISION)
    target = table_grads_ptr + tl.load(block_ptr).to(tl.int64) * (C * E) + c[:, None] * E + columns[None, :]
    tl.store(target, total.to(table_grads_ptr.dtype.element_ty), mask=(c < C)[:, None] & in_heads[None, :])


@triton.jit(do_not_specialize=["start", "first_row"])
def input_gradients_kernel(
    row_grads_ptr,
    table_ptr,
    grads_ptr,
    blocks_ptr,
    queries_ptr,
    keys_ptr,
    start,
    first_row,
    batch,
    tokens,
    C: tl.constexpr,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    BY_QUERY: tl.constexpr,
    ATOMIC: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    HP: tl.constexpr,
    DP: tl.constexpr,
):
    """Add gradients · matrixᵀ to the gradients (b, n, c) of a role's tokens, in fp32, for a block of columns."""
    GROUPS: tl.constexpr = (HEADS + HP - 1) // HP
    C_BLOCKS: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    E: tl.constexpr = HEADS * D
    c = tl.program_id(0) % C_BLOCKS * BLOCK_C + tl.arange(0, BLOCK_C)
    block_ptr = blocks_ptr + (start + tl.program_id(0) // C_BLOCKS) * 4
    m, exists, sample, query, key = block_rows(block_ptr, tl.load(block_ptr + 1), queries_ptr, keys_ptr, batch, BLOCK_M)
    matrix_ptr = table_ptr + tl.load(block_ptr).to(tl.int64) * (C * E)
    total = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for group in range(0, GROUPS):
        grads = gradient_rows(grads_ptr, first_row, block_ptr, m, exists, group, batch, HEADS, D, HP, DP)
        _, columns, in_heads = head_columns(group, HEADS, D, HP, DP)
        matrix = tl.load(
            matrix_ptr + c[:, None] * E + columns[None, :], mask=(c < C)[:, None] & in_heads[None, :], other=0.0
        )
        total = add_product(grads, tl.trans(matrix.to(grads.dtype)), total, PRECISION)
    rows = sample * tokens + (query if BY_QUERY else key)
    add_to(
        row_grads_ptr, rows[:, None].to(tl.int64) * C + c[None, :], total, exists[:, None] & (c < C)[None, :], ATOMIC
    )


@triton.jit(do_not_specialize=["start", "first_row"])
def plain_gradients_kernel(
    row_grads_ptr,
    grads_ptr,
    blocks_ptr,
    queries_ptr,
    keys_ptr,
    start,
    first_row,
    batch,
    tokens,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    BY_QUERY: tl.constexpr,
    ATOMIC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    HP: tl.constexpr,
    DP: tl.constexpr,
):
    """Add gradients to the gradients (b, n, e) of the projected rows of a role without a table, in fp32."""
    GROUPS: tl.constexpr = (HEADS + HP - 1) // HP
    group = tl.program_id(0) % GROUPS
    block_ptr = blocks_ptr + (start + tl.program_id(0) // GROUPS) * 4
    m, exists, sample, query, key = block_rows(block_ptr, tl.load(block_ptr + 1), queries_ptr, keys_ptr, batch, BLOCK_M)
    grads = gradient_rows(grads_ptr, first_row, block_ptr, m, exists, group, batch, HEADS, D, HP, DP)
    _, columns, in_heads = head_columns(group, HEADS, D, HP, DP)
    rows = sample * tokens + (query if BY_QUERY else key)
    target = rows[:, None].to(tl.int64) * (HEADS * D) + columns[None, :]
    add_to(row_grads_ptr, target, grads.to(tl.float32), exists[:, None] & in_heads[None, :], ATOMIC)
