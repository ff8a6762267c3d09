"""The Triton kernels of the fused operator. Only this module imports triton.

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
def _row_numbers(block_ptr, first, BLOCK_M: tl.constexpr):
    """Rows ``first`` to ``first + BLOCK_M − 1`` of a block's relation, and which of them exist."""
    m = first + tl.arange(0, BLOCK_M)
    return m, m < tl.load(block_ptr + 2)


@triton.jit
def _positions(block_ptr, queries_ptr, keys_ptr, m, exists, batch):
    """Sample, query token and key token of rows, int64."""
    pair = tl.load(block_ptr + 3) + m // batch
    query = tl.load(queries_ptr + pair, mask=exists, other=0)
    key = tl.load(keys_ptr + pair, mask=exists, other=0)
    return (m % batch).to(tl.int64), query.to(tl.int64), key.to(tl.int64)


@triton.jit
def _columns(group, HEADS: tl.constexpr, D: tl.constexpr, HP: tl.constexpr, DP: tl.constexpr):
    """Heads (HP,) of a group, and columns (HP·DP,) of the heads in a matrix with which of them exist."""
    heads = group * HP + tl.arange(0, HP)
    column = tl.arange(0, HP * DP)
    head, within = group * HP + column // DP, column % DP
    return heads, head * D + within, (head < HEADS) & (within < D)


@triton.jit
def _by_column(values, BLOCK_M: tl.constexpr, HP: tl.constexpr, DP: tl.constexpr):
    """Repeat values of heads (BLOCK_M, HP) for the columns of each head, (BLOCK_M, HP·DP)."""
    return tl.reshape(tl.broadcast_to(values[:, :, None], (BLOCK_M, HP, DP)), (BLOCK_M, HP * DP))


@triton.jit
def _pair_offsets(sample, query, key, heads, tokens, HEADS: tl.constexpr):
    """Offsets (BLOCK_M, HP) of pairs in (b, h, n, n)."""
    return ((sample[:, None] * HEADS + heads[None, :]) * tokens + query[:, None]) * tokens + key[:, None]


@triton.jit
def _product(a, b, total, PRECISION: tl.constexpr):
    """Add a·b to a total in fp32. "upcast" is for the interpreter, which multiplies bf16 as integers."""
    if PRECISION == "upcast":
        return tl.dot(a.to(tl.float32), b.to(tl.float32), total, input_precision="ieee")
    else:  # noqa: RET505 - Triton compiles only one branch.
        return tl.dot(a, b, total, input_precision=PRECISION)


@triton.jit
def _project(
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
            x = tl.load(rows_ptr + rows[:, None] * C + c[None, :], mask=exists[:, None] & (c < C)[None, :], other=0.0)
            matrix = tl.load(
                table_ptr + c[:, None] * E + columns[None, :], mask=(c < C)[:, None] & in_heads[None, :], other=0.0
            )
            projected = _product(x, matrix.to(x.dtype), projected, PRECISION)
    else:
        projected = tl.load(
            rows_ptr + rows[:, None] * E + columns[None, :], mask=exists[:, None] & in_heads[None, :], other=0.0
        ).to(tl.float32)
    return projected


@triton.jit
def _add(target_ptr, offsets, values, mask, ATOMIC: tl.constexpr):
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
    m, exists = _row_numbers(block_ptr, tl.load(block_ptr + 1), BLOCK_M)
    sample, query, key = _positions(block_ptr, queries_ptr, keys_ptr, m, exists, batch)
    heads, columns, in_heads = _columns(tl.program_id(0) % GROUPS, HEADS, D, HP, DP)
    matrix = tl.load(block_ptr).to(tl.int64) * (C * E)
    q = _project(
        query_ptr, query_table_ptr + matrix, sample * tokens + query, exists, columns, in_heads,
        C, E, BLOCK_M, BLOCK_C, HP * DP, QUERY_TABLE, PRECISION,
    )  # fmt: skip
    k = _project(
        key_ptr, key_table_ptr + matrix, sample * tokens + key, exists, columns, in_heads,
        C, E, BLOCK_M, BLOCK_C, HP * DP, KEY_TABLE, PRECISION,
    )  # fmt: skip
    values = tl.sum(tl.reshape(q * k, (BLOCK_M, HP, DP)), axis=2)
    target = logits_ptr + _pair_offsets(sample, query, key, heads, tokens, HEADS)
    mask = exists[:, None] & (heads < HEADS)[None, :]
    if ADD:
        values += tl.load(target, mask=mask, other=0.0)
    tl.store(target, values, mask=mask)


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
    m, exists = _row_numbers(block_ptr, tl.load(block_ptr + 1), BLOCK_M)
    sample, query, key = _positions(block_ptr, queries_ptr, keys_ptr, m, exists, batch)
    heads, columns, in_heads = _columns(tl.program_id(0) % GROUPS, HEADS, D, HP, DP)
    matrix = tl.load(block_ptr).to(tl.int64) * (C * E)
    grad = tl.load(
        grad_logits_ptr + _pair_offsets(sample, query, key, heads, tokens, HEADS),
        mask=exists[:, None] & (heads < HEADS)[None, :],
        other=0.0,
    )
    grad = _by_column(grad.to(tl.float32), BLOCK_M, HP, DP)
    target = (tl.load(block_ptr + 3).to(tl.int64) * batch - first_row + m)[:, None] * E + columns[None, :]
    mask = exists[:, None] & in_heads[None, :]
    if QUERY_GRADS:
        k = _project(
            key_ptr, key_table_ptr + matrix, sample * tokens + key, exists, columns, in_heads,
            C, E, BLOCK_M, BLOCK_C, HP * DP, KEY_TABLE, PRECISION,
        )  # fmt: skip
        tl.store(query_grads_ptr + target, (grad * k).to(query_grads_ptr.dtype.element_ty), mask=mask)
    if KEY_GRADS:
        q = _project(
            query_ptr, query_table_ptr + matrix, sample * tokens + query, exists, columns, in_heads,
            C, E, BLOCK_M, BLOCK_C, HP * DP, QUERY_TABLE, PRECISION,
        )  # fmt: skip
        tl.store(key_grads_ptr + target, (grad * q).to(key_grads_ptr.dtype.element_ty), mask=mask)


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
    m, exists = _row_numbers(block_ptr, tl.load(block_ptr + 1), BLOCK_M)
    sample, query, key = _positions(block_ptr, queries_ptr, keys_ptr, m, exists, batch)
    heads, columns, in_heads = _columns(tl.program_id(0) % GROUPS, HEADS, D, HP, DP)
    matrix = tl.load(block_ptr).to(tl.int64) * (C * E)
    v = _project(
        value_ptr, table_ptr + matrix, sample * tokens + key, exists, columns, in_heads,
        C, E, BLOCK_M, BLOCK_C, HP * DP, True, PRECISION,
    )  # fmt: skip
    weights = tl.load(
        weights_ptr + _pair_offsets(sample, query, key, heads, tokens, HEADS),
        mask=exists[:, None] & (heads < HEADS)[None, :],
        other=0.0,
    )
    v *= _by_column(weights.to(tl.float32), BLOCK_M, HP, DP)
    target = (sample * tokens + query)[:, None] * E + columns[None, :]
    _add(out_ptr, target, v, exists[:, None] & in_heads[None, :], ATOMIC)


@triton.jit
def _gradient_rows(
    grads_ptr,
    weights_ptr,
    first_row,
    block_ptr,
    m,
    exists,
    sample,
    query,
    key,
    group,
    batch,
    tokens,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    HP: tl.constexpr,
    DP: tl.constexpr,
):
    """Gradients of a block's projected rows for a group of heads, (BLOCK_M, HP·DP) in the dtype of the rows.

    They are read from a chunk's rows, or, for values, are the output's gradient (b, n, e) times the weights.
    """
    heads, columns, in_heads = _columns(group, HEADS, D, HP, DP)
    mask = exists[:, None] & in_heads[None, :]
    if WEIGHTED:
        rows = sample * tokens + query
    else:
        rows = tl.load(block_ptr + 3).to(tl.int64) * batch - first_row + m
    grads = tl.load(grads_ptr + rows[:, None] * (HEADS * D) + columns[None, :], mask=mask, other=0.0)
    if WEIGHTED:
        weights = tl.load(
            weights_ptr + _pair_offsets(sample, query, key, heads, tokens, HEADS),
            mask=exists[:, None] & (heads < HEADS)[None, :],
            other=0.0,
        )
        products = grads.to(tl.float32) * _by_column(weights.to(tl.float32), BLOCK_M, HP, DP)
        grads = products.to(grads_ptr.dtype.element_ty)
    return grads


@triton.jit(do_not_specialize=["start", "first_row"])
def matrix_gradients_kernel(
    table_grads_ptr,
    rows_ptr,
    grads_ptr,
    weights_ptr,
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
    WEIGHTED: tl.constexpr,
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
    total = tl.zeros((BLOCK_C, HP * DP), tl.float32)
    for begin in range(0, tl.load(block_ptr + 2), BLOCK_M):
        m, exists = _row_numbers(block_ptr, begin, BLOCK_M)
        sample, query, key = _positions(block_ptr, queries_ptr, keys_ptr, m, exists, batch)
        grads = _gradient_rows(
            grads_ptr, weights_ptr, first_row, block_ptr, m, exists, sample, query, key, group, batch, tokens,
            HEADS, D, WEIGHTED, BLOCK_M, HP, DP,
        )  # fmt: skip
        rows = sample * tokens + (query if BY_QUERY else key)
        x = tl.load(rows_ptr + rows[:, None] * C + c[None, :], mask=exists[:, None] & (c < C)[None, :], other=0.0)
        total = _product(tl.trans(x), grads, total, PRECISION)
    _, columns, in_heads = _columns(group, HEADS, D, HP, DP)
    target = table_grads_ptr + tl.load(block_ptr).to(tl.int64) * (C * E) + c[:, None] * E + columns[None, :]
    tl.store(target, total.to(table_grads_ptr.dtype.element_ty), mask=(c < C)[:, None] & in_heads[None, :])


@triton.jit(do_not_specialize=["start", "first_row"])
def input_gradients_kernel(
    row_grads_ptr,
    table_ptr,
    grads_ptr,
    weights_ptr,
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
    WEIGHTED: tl.constexpr,
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
    m, exists = _row_numbers(block_ptr, tl.load(block_ptr + 1), BLOCK_M)
    sample, query, key = _positions(block_ptr, queries_ptr, keys_ptr, m, exists, batch)
    matrix_ptr = table_ptr + tl.load(block_ptr).to(tl.int64) * (C * E)
    total = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for group in range(0, GROUPS):
        grads = _gradient_rows(
            grads_ptr, weights_ptr, first_row, block_ptr, m, exists, sample, query, key, group, batch, tokens,
            HEADS, D, WEIGHTED, BLOCK_M, HP, DP,
        )  # fmt: skip
        _, columns, in_heads = _columns(group, HEADS, D, HP, DP)
        matrix = tl.load(
            matrix_ptr + c[:, None] * E + columns[None, :], mask=(c < C)[:, None] & in_heads[None, :], other=0.0
        )
        total = _product(grads, tl.trans(matrix.to(grads.dtype)), total, PRECISION)
    rows = sample * tokens + (query if BY_QUERY else key)
    _add(row_grads_ptr, rows[:, None] * C + c[None, :], total, exists[:, None] & (c < C)[None, :], ATOMIC)


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
    m, exists = _row_numbers(block_ptr, tl.load(block_ptr + 1), BLOCK_M)
    sample, query, key = _positions(block_ptr, queries_ptr, keys_ptr, m, exists, batch)
    grads = _gradient_rows(
        grads_ptr, grads_ptr, first_row, block_ptr, m, exists, sample, query, key, group, batch, tokens,
        HEADS, D, False, BLOCK_M, HP, DP,
    )  # fmt: skip
    _, columns, in_heads = _columns(group, HEADS, D, HP, DP)
    rows = sample * tokens + (query if BY_QUERY else key)
    target = rows[:, None] * (HEADS * D) + columns[None, :]
    _add(row_grads_ptr, target, grads.to(tl.float32), exists[:, None] & in_heads[None, :], ATOMIC)
