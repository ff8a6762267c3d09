"""Simulation of both ends of a network: the embedding of tokens, pooling, and the loss.

Source: events of torch 2.13's allocator; models/networks/head.py.
"""

from __future__ import annotations

from ...config.model_base import LOSS_CHUNK_ELEMENTS
from ..core import Gradients, ModuleParams, Passed, Storage, Tape, Tensor
from .ops import (
    GRADIENTS,
    TEMPORARY,
    DtypeSizes,
    cast,
    cast_parameters,
    pass_gradients,
    product_scratch_bytes,
    weight_gradients,
)


def embed(tape: Tape, rows: int, width: int, weights: ModuleParams, indices: Storage, sizes: DtypeSizes) -> Tensor:
    """Look up (rows,) ids in a table; saves the ids; the table's gradient is dense."""
    tape.hooks.fetch(weights, backward=False)
    out = tape.new(rows * width * sizes.value)
    tape.hooks.release(weights, backward=False)

    def backward(grad: Storage) -> Gradients:
        tape.hooks.fetch(weights, backward=True)
        weight_gradients(tape, weights, sizes.parameter)
        tape.hooks.release(weights, backward=True)
        return ()

    return tape.result(out, (), backward, (indices,))


def pool_first(tape: Tape, x: Tensor) -> Tensor:
    """Return the class token of every sample, a view; backward allocates a gradient for all tokens."""
    size = x.size
    return tape.result(x.storage, (x,), lambda grad: (tape.new(size, GRADIENTS),))


def pool_mean(tape: Tape, x: Tensor, size: int, sizes: DtypeSizes) -> Tensor:
    """Average over tokens to ``size`` bytes; backward divides an expanded gradient."""
    full_size = x.size
    out = tape.new(size)
    if sizes.device == "cpu" and sizes.value < sizes.accumulator:
        # A CPU widens the full input to sum it.
        tape.new(x.size // sizes.value * sizes.accumulator + size // sizes.value * sizes.accumulator, TEMPORARY)
    return tape.result(out, (x,), lambda grad: (tape.new(full_size, GRADIENTS),))


def cross_entropy(tape: Tape, logits: Tensor, targets: Storage) -> Tensor:
    """Return the mean loss of fp32 logits; saves the log-probabilities; backward makes two tensors of their size."""
    size = logits.size
    probabilities = tape.new(size)
    loss, weight = tape.new(4), tape.new(4)

    def backward(grad: Storage) -> Gradients:
        inner = tape.new(size, GRADIENTS)
        outer = tape.new(size, GRADIENTS)
        del inner
        return (outer,)

    return tape.result(loss, (logits,), backward, (probabilities, targets, weight))


def mixed_cross_entropy(tape: Tape, logits: Tensor, targets: Storage, *, smoothed: bool) -> Tensor:
    """Return the mean loss of fp32 logits with class probabilities as targets, which may be smoothed in a copy.

    Source: torch 2.13, aten/src/ATen/native/LossNLL.cpp, cross_entropy_loss_prob_target.
    """
    size = logits.size
    probabilities = tape.new(size)
    if smoothed:
        scaled = tape.new(size, TEMPORARY)
        targets = tape.new(size)
        del scaled
    tape.new(size, TEMPORARY)

    def gradient(grad: Storage) -> Gradients:
        return (tape.new(size, GRADIENTS),)

    # Backward of the products with the targets releases smoothed ones.
    log_probabilities = tape.result(probabilities, (logits,), gradient, (probabilities,))
    return tape.result(tape.new(4), (log_probabilities,), gradient, (targets,))


def chunked_cross_entropy(
    tape: Tape, x: Tensor, rows: int, dim: int, vocabulary: int, weights: ModuleParams, sizes: DtypeSizes
) -> Tensor:
    """Return the mean loss of a head in chunks of tokens; forward computes the gradients too, and holds only these.

    Args:
        tape, weights, sizes: as in `linear`.
        x: the head's input.
        rows, dim, vocabulary: tokens of the micro-batch, and shape of the head's weight.
    """
    wanted = x.node is not None
    tape.hooks.fetch(weights, backward=False)
    x = cast(tape, x, rows * dim, sizes.wide, sizes)
    casts = cast_parameters(tape, weights, sizes)
    held = Passed(tape.new(count * dim * sizes.value if wanted else 0) for count in (rows, vocabulary))
    step = max(1, LOSS_CHUNK_ELEMENTS // vocabulary)
    # Later chunks allocate what the first does.
    _loss_chunk(tape, min(rows, step), dim, vocabulary, sizes, wanted=wanted)
    loss = tape.new(4)
    tape.hooks.release(weights, backward=False)

    def backward(grad: Storage) -> Gradients:
        tape.hooks.fetch(weights, backward=True)
        given = held.pop(0)
        if casts_back:
            tape.hooks.release(weights, backward=True)
            return (given, held.pop())
        pass_gradients(tape, weights, [held.pop()])
        tape.hooks.release(weights, backward=True)
        return (given,)

    casts_back = len(casts)
    return tape.result(loss, (x, *casts), backward, held)


def _loss_chunk(tape: Tape, rows: int, dim: int, vocabulary: int, sizes: DtypeSizes, *, wanted: bool) -> None:
    """Compute the loss of one chunk, and the gradients of its logits."""
    size, wide = rows * vocabulary * sizes.value, rows * vocabulary * sizes.accumulator
    narrow = sizes.value < sizes.accumulator
    logits = tape.new(size)
    tape.new(product_scratch_bytes(rows, dim, vocabulary, sizes), TEMPORARY)
    if narrow:
        logits = tape.new(wide)
    grad = tape.new(wide)
    del logits
    if not wanted:
        return
    if narrow:
        grad = tape.new(size, GRADIENTS)
    tape.new(product_scratch_bytes(rows, vocabulary, dim, sizes), TEMPORARY)
    tape.new(product_scratch_bytes(vocabulary, rows, dim, sizes, transposed=True), TEMPORARY)
    del grad
