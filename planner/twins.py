"""Twins of torch's own operations: what each allocates, keeps and frees, forward and backward.

Rows are tokens of the whole micro-batch. Source: torch 2.13, its allocator's events operation by
operation; `tests/test_schedule.py` compares whole training steps with them.
"""

from __future__ import annotations

from dataclasses import dataclass

from .tape import Gradients, Storage, Tape, Tensor, Weights

ACTIVATIONS, GRADIENTS, WEIGHT_GRADIENTS = "activations", "activation gradients", "whole gradients"
TEMPORARY = "temporaries of one operation"
INDEX_BYTES = 8
"""Class and token numbers are int64."""


@dataclass(frozen=True, slots=True)
class Widths:
    """Bytes per value of the tensors of a run, and what they depend on."""

    value: int
    """An activation, a parameter, a gradient."""
    statistic: int
    """LayerNorm's mean and deviation: the model's dtype on a CPU, at least fp32 on a GPU."""
    accumulator: int = 4
    """Sums over relations and softmax: at least fp32."""
    device: str = "cpu"
    threads: int = 1
    """CPU threads, each with blocks of its own."""
    packs: bool = True
    """Whether the CPU packs the matrices of half-width products: with AVX-512; other CPUs need no scratch."""

    copies_products: bool = False
    """Whether gradients of a tile's matrices are made in another tensor first, as a GPU's grouped product does."""

    @classmethod
    def of(cls, dtype_bytes: int, device: str, threads: int = 1, *, packs: bool = True) -> Widths:
        """The widths for a model dtype of so many bytes on "cpu" or "cuda"."""
        wide = max(4, dtype_bytes)
        return cls(
            dtype_bytes, dtype_bytes if device == "cpu" else wide, wide, device, threads, packs, device == "cuda"
        )


def product_scratch_bytes(rows: int, inner: int, cols: int, w: Widths, *, transposed: bool = False) -> int:
    """At most so much scratch for a product of half-width matrices on a CPU; nothing elsewhere.

    oneDNN packs blocks of both matrices and sums in fp32, per thread, and a transposed left matrix is
    copied. Its block sizes depend on the processor: this errs high. Source: measured, torch 2.13,
    oneDNN's kernels for AVX-512 bf16.
    """
    if w.device != "cpu" or w.value >= w.accumulator or not w.packs:
        return 0
    block = min(64, -(-cols // 16) * 16)
    packed = 2 * min(inner, 1024) * block + 4 * min(rows, 256) * block + 4096
    return w.threads * (packed + (min(2 * rows * inner, 5 * 2**18) + 8192 if transposed else 0))


def weight_gradients(tape: Tape, weights: Weights, width: int) -> None:
    """Allocate the gradients of a module's parameters and hand them on."""
    tape.policy.gradients(weights, [tape.new(numel * width, WEIGHT_GRADIENTS) for numel in weights.numels])


def linear(tape: Tape, x: Tensor, rows: int, d_in: int, d_out: int, weights: Weights, w: Widths) -> Tensor:
    """(rows, d_in) → (rows, d_out); keeps its input."""
    tape.policy.fetch(weights, backward=False)
    out = tape.new(rows * d_out * w.value)
    tape.new(product_scratch_bytes(rows, d_in, d_out, w), TEMPORARY)
    tape.policy.release(weights, backward=False)
    wanted = x.node is not None

    def backward(grad: Storage) -> Gradients:
        tape.policy.fetch(weights, backward=True)
        given = tape.new(rows * d_in * w.value, GRADIENTS) if wanted else None
        grads = [tape.new(numel * w.value, WEIGHT_GRADIENTS) for numel in weights.numels]
        tape.new(product_scratch_bytes(d_out, rows, d_in, w, transposed=True), TEMPORARY)
        tape.policy.gradients(weights, grads)
        del grads
        tape.policy.release(weights, backward=True)
        return (given,)

    return tape.result(out, (x,), backward, (x.storage,))


def layer_norm(tape: Tape, x: Tensor, rows: int, width: int, weights: Weights, w: Widths, *, copies: int = 0) -> Tensor:
    """(rows, width) → the same; keeps its input and two numbers a row.

    Args:
        tape, x, weights, w: as in `linear`.
        rows, width: of the input.
        copies: bytes of a contiguous copy of the gradient, where it comes as a part of a larger tensor.
    """
    tape.policy.fetch(weights, backward=False)
    out = tape.new(rows * width * w.value)
    statistics = tape.new(2 * rows * w.statistic)
    tape.policy.release(weights, backward=False)
    wanted = x.node is not None

    def backward(grad: Storage) -> Gradients:
        tape.policy.fetch(weights, backward=True)
        given = tape.new(rows * width * w.value, GRADIENTS) if wanted else None
        copy = tape.new(copies, TEMPORARY)
        block = tape.new(2 * w.threads * width * w.accumulator, TEMPORARY)
        weight_gradients(tape, weights, w.value)
        del copy, block
        tape.policy.release(weights, backward=True)
        return (given,)

    return tape.result(out, (x,), backward, (x.storage, statistics))


def gelu(tape: Tape, x: Tensor) -> Tensor:
    """Elementwise; keeps its input."""
    size = x.size
    return tape.result(tape.new(size), (x,), lambda grad: (tape.new(size, GRADIENTS),), (x.storage,))


def add(tape: Tape, x: Tensor, y: Tensor) -> Tensor:
    """Sum of two of equal shape; both get the same gradient."""
    return tape.result(tape.new(max(x.size, y.size)), (x, y), lambda grad: (grad, grad))


def add_positions(tape: Tape, x: Tensor, weights: Weights, w: Widths) -> Tensor:
    """Adds a learned (1, N, C) tensor; its gradient is the sum over the batch."""
    tape.policy.fetch(weights, backward=False)
    out = tape.new(x.size)
    tape.policy.release(weights, backward=False)

    def backward(grad: Storage) -> Gradients:
        tape.policy.fetch(weights, backward=True)
        weight_gradients(tape, weights, w.value)
        tape.policy.release(weights, backward=True)
        return (grad,)

    return tape.result(out, (x,), backward)


def prepend(tape: Tape, x: Tensor, size: int, weights: Weights, w: Widths) -> Tensor:
    """Joins a learned token before the others into a tensor of so many bytes; x's gradient is a view."""
    tape.policy.fetch(weights, backward=False)
    out = tape.new(size)
    tape.policy.release(weights, backward=False)

    def backward(grad: Storage) -> Gradients:
        tape.policy.fetch(weights, backward=True)
        weight_gradients(tape, weights, w.value)
        tape.policy.release(weights, backward=True)
        return (grad,)

    return tape.result(out, (x,), backward)


def embed(tape: Tape, rows: int, width: int, weights: Weights, indices: Storage, w: Widths) -> Tensor:
    """Looks up (rows,) numbers in a table; keeps the numbers, and its gradient is dense."""
    tape.policy.fetch(weights, backward=False)
    out = tape.new(rows * width * w.value)
    tape.policy.release(weights, backward=False)

    def backward(grad: Storage) -> Gradients:
        tape.policy.fetch(weights, backward=True)
        weight_gradients(tape, weights, w.value)
        tape.policy.release(weights, backward=True)
        return ()

    return tape.result(out, (), backward, (indices,))


def pool_first(tape: Tape, x: Tensor) -> Tensor:
    """The class token of every sample, a view; backward fills a gradient for all tokens."""
    size = x.size
    return tape.result(x.storage, (x,), lambda grad: (tape.new(size, GRADIENTS),))


def pool_mean(tape: Tape, x: Tensor, size: int, w: Widths) -> Tensor:
    """The mean over tokens, of so many bytes; backward divides an expanded gradient."""
    whole = x.size
    out = tape.new(size)
    if w.device == "cpu" and w.value < w.accumulator:
        # A CPU widens the whole input to sum it.
        tape.new(x.size // w.value * w.accumulator + size // w.value * w.accumulator, TEMPORARY)
    return tape.result(out, (x,), lambda grad: (tape.new(whole, GRADIENTS),))


def cast(tape: Tape, x: Tensor, size: int) -> Tensor:
    """Another dtype, of so many bytes."""
    before = x.size
    return tape.result(tape.new(size), (x,), lambda grad: (tape.new(before, GRADIENTS),))


def cross_entropy(tape: Tape, logits: Tensor, targets: Storage) -> Tensor:
    """Mean loss of fp32 logits: log-probabilities are kept; backward makes two more of their size."""
    size = logits.size
    probabilities = tape.new(size)
    loss, weight = tape.new(4), tape.new(4)

    def backward(grad: Storage) -> Gradients:
        inner = tape.new(size, GRADIENTS)
        outer = tape.new(size, GRADIENTS)
        del inner
        return (outer,)

    return tape.result(loss, (logits,), backward, (probabilities, targets, weight))


def dropout(tape: Tape, x: Tensor, w: Widths, *, last: bool = False) -> Tensor:
    """Elementwise; keeps its noise, on a CPU as wide as the values, on a GPU one byte each.

    Args:
        tape, x, w: as in `linear`.
        last: whether the noise is the last thing that is kept, so that a checkpoint stops here.
    """
    size = x.size
    noise = tape.new(size if w.device == "cpu" else size // w.value)
    tape.stopped |= last
    return tape.result(tape.new(size), (x,), lambda grad: (tape.new(size, GRADIENTS),), (noise,))


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
    """Queries or keys turned by rotary embedding, into a new tensor; nothing is kept."""
    size = numel * w.value
    halves = tape.new(size, TEMPORARY)
    tape.new(size, TEMPORARY)
    out = tape.new(size)
    del halves

    def backward(grad: Storage) -> Gradients:
        tape.new(2 * size, TEMPORARY)
        return (tape.new(size, GRADIENTS),)

    return tape.result(out, (x,), backward)


def positions(
    tape: Tape, x: Tensor, batch: int, d_in: int, d_out: int, tiles: list[tuple[int, Weights]], w: Widths
) -> Tensor:
    """Every token times its position's matrix, tile by tile, joined into one tensor; keeps its input."""
    total = sum(count for count, _ in tiles)
    parts = [_position_tile(tape, x, batch * count, batch * total, d_in, d_out, weights, w) for count, weights in tiles]
    return tape.result(tape.new(batch * total * d_out * w.value), parts, lambda grad: [grad] * len(tiles))


def _position_tile(
    tape: Tape, x: Tensor, rows: int, all_rows: int, d_in: int, d_out: int, weights: Weights, w: Widths
) -> Tensor:
    whole = all_rows * d_in * w.value
    # A slice's gradient is as large as the whole input, nought elsewhere.
    x = tape.result(x.storage, (x,), lambda grad: (tape.new(whole, GRADIENTS),))
    tape.policy.fetch(weights, backward=False)
    out = tape.new(rows * d_out * w.value)
    tape.policy.release(weights, backward=False)

    def backward(grad: Storage) -> Gradients:
        tape.policy.fetch(weights, backward=True)
        part = tape.new(rows * d_in * w.value, GRADIENTS)
        weight_gradients(tape, weights, w.value)
        tape.policy.release(weights, backward=True)
        return (part,)

    return tape.result(out, (x,), backward, (x.storage,))


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
