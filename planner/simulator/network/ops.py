"""Twins of torch's own operations: what each allocates, keeps and frees, forward and backward.

Rows are tokens of the whole micro-batch. Source: torch 2.13, its allocator's events operation by
operation; `tests/test_schedule.py` compares whole training steps with them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..core.autograd import Backward, Gradients, ModuleParams, Tape, Tensor
from ..core.storage import Storage

ACTIVATIONS, GRADIENTS, WEIGHT_GRADIENTS = "activations", "activation gradients", "whole gradients"
TEMPORARY, CASTS = "temporaries of one operation", "cast parameters"
ATTENTION_WEIGHTS = "attention weights"
INDEX_BYTES = 8
"""Class and token numbers are int64."""


@dataclass(frozen=True, slots=True)
class DtypeSizes:
    """Bytes per value of the tensors of a run, and what they depend on."""

    value: int
    """An activation and its gradient; under autocast, those of products."""
    parameter: int
    """A parameter and its gradient: as a value, but for autocast."""
    statistic: int
    """LayerNorm's mean and deviation: the model's dtype on a CPU, at least fp32 on a GPU."""
    accumulator: int = 4
    """Sums over relations and softmax: at least fp32."""
    device: str = "cpu"
    threads: int = 1
    """CPU threads, each with blocks of its own."""
    packs: bool = True
    """Whether the CPU packs the matrices of half-width products: with AVX-512; other CPUs need no scratch."""
    batched: bool = False
    """Whether many relations are multiplied at a time, as on a GPU."""
    copies_products: bool = False
    """Whether gradients of a tile's matrices are made in another tensor first, as a GPU's grouped product does."""

    @classmethod
    def of(cls, dtype_bytes: int, device: str, threads: int = 1, *, packs: bool = True) -> DtypeSizes:
        """The widths for a model dtype of so many bytes on "cpu" or "cuda"."""
        wide = max(4, dtype_bytes)
        statistic, gpu = dtype_bytes if device == "cpu" else wide, device == "cuda"
        return cls(dtype_bytes, dtype_bytes, statistic, wide, device, threads, packs, gpu, gpu)

    @classmethod
    def autocast(cls, device: str, threads: int = 1, *, packs: bool = True) -> DtypeSizes:
        """The widths for fp32 parameters under `torch.autocast` to bf16 or fp16 on "cpu" or "cuda"."""
        gpu = device == "cuda"
        return cls(2, 4, 4, 4, device, threads, packs, gpu, gpu)

    @property
    def casts(self) -> bool:
        """Whether products cast their operands, as autocast lets them."""
        return self.value != self.parameter

    @property
    def wide(self) -> DtypeSizes:
        """Those of what autocast leaves in the parameters' dtype."""
        return replace(self, value=self.parameter)


def product_scratch_bytes(rows: int, inner: int, cols: int, sizes: DtypeSizes, *, transposed: bool = False) -> int:
    """At most so much scratch for a product of half-width matrices on a CPU; nothing elsewhere.

    oneDNN packs blocks of both matrices and sums in fp32, per thread, and a transposed left matrix is
    copied. Its block sizes depend on the processor: this errs high. Source: measured, torch 2.13,
    oneDNN's kernels for AVX-512 bf16.
    """
    if sizes.device != "cpu" or sizes.value >= sizes.accumulator or not sizes.packs:
        return 0
    block = min(64, -(-cols // 16) * 16)
    packed = 2 * min(inner, 1024) * block + 4 * min(rows, 256) * block + 4096
    return sizes.threads * (packed + (min(2 * rows * inner, 5 * 2**18) + 8192 if transposed else 0))


def weight_gradients(tape: Tape, weights: ModuleParams, width: int) -> None:
    """Allocate the gradients of a module's parameters and hand them on."""
    tape.hooks.gradients(weights, [tape.new(numel * width, WEIGHT_GRADIENTS) for numel in weights.numels])


def cast_parameters(tape: Tape, weights: ModuleParams, sizes: DtypeSizes) -> list[Tensor]:
    """Copies of a module's parameters for its products, which autocast holds until its context ends.

    They are made last to first, as a call's arguments are; nothing where products take them as they are.
    """
    if not sizes.casts:
        return []
    found: dict[int, Storage] = {}

    def cast_back(number: int, numel: int) -> Backward:
        def backward(grad: Storage) -> Gradients:
            found[number] = tape.new(numel * sizes.parameter, WEIGHT_GRADIENTS)
            if len(found) == len(weights.numels):
                tape.hooks.gradients(weights, [found.pop(n) for n in range(len(weights.numels))])
            return ()

        return backward

    copies = []
    for number, numel in reversed(list(enumerate(weights.numels))):
        copies.append(tape.result(tape.new(numel * sizes.value, CASTS), (), cast_back(number, numel)))
    copies.reverse()
    tape.casts += [copy.storage for copy in copies]
    return copies


def linear(
    tape: Tape,
    x: Tensor,
    rows: int,
    d_in: int,
    d_out: int,
    weights: ModuleParams,
    sizes: DtypeSizes,
    *,
    given: DtypeSizes | None = None,
    last: bool = False,
) -> Tensor:
    """(rows, d_in) → (rows, d_out); keeps its input, and under autocast its weight's copy.

    Args:
        tape: where it runs.
        x: the input.
        rows, d_in, d_out: sizes.
        weights: the module's.
        w: widths of values.
        given: widths of the input, which autocast casts, where they are others.
        last: whether the input is the last thing that is kept, so that a checkpoint stops here.
    """
    tape.hooks.fetch(weights, backward=False)
    casts = cast_parameters(tape, weights, sizes)
    x = cast(tape, x, rows * d_in, given or sizes, sizes)
    tape.stopped |= last
    out = tape.new(rows * d_out * sizes.value)
    tape.new(product_scratch_bytes(rows, d_in, d_out, sizes), TEMPORARY)
    tape.hooks.release(weights, backward=False)
    wanted = x.node is not None

    def backward(grad: Storage) -> Gradients:
        tape.hooks.fetch(weights, backward=True)
        given = tape.new(rows * d_in * sizes.value, GRADIENTS) if wanted else None
        what = GRADIENTS if casts_back else WEIGHT_GRADIENTS
        grads = [tape.new(numel * sizes.value, what) for numel in weights.numels]
        tape.new(product_scratch_bytes(d_out, rows, d_in, sizes, transposed=True), TEMPORARY)
        if casts_back:
            tape.hooks.release(weights, backward=True)
            return (given, *grads)
        tape.hooks.gradients(weights, grads)
        del grads
        tape.hooks.release(weights, backward=True)
        return (given,)

    casts_back = len(casts)
    kept = (x.storage, *(copy.storage for copy in casts[:1]))
    return tape.result(out, (x, *casts), backward, kept)


def layer_norm(
    tape: Tape, x: Tensor, rows: int, width: int, weights: ModuleParams, sizes: DtypeSizes, *, copies: int = 0
) -> Tensor:
    """(rows, width) → the same; keeps its input and two numbers a row.

    Args:
        tape, x, weights, w: as in `linear`.
        rows, width: of the input.
        copies: bytes of a contiguous copy of the gradient, where it comes as a part of a larger tensor.
    """
    tape.hooks.fetch(weights, backward=False)
    out = tape.new(rows * width * sizes.value)
    statistics = tape.new(2 * rows * sizes.statistic)
    tape.hooks.release(weights, backward=False)
    wanted = x.node is not None

    def backward(grad: Storage) -> Gradients:
        tape.hooks.fetch(weights, backward=True)
        given = tape.new(rows * width * sizes.value, GRADIENTS) if wanted else None
        copy = tape.new(copies, TEMPORARY)
        block = tape.new(2 * sizes.threads * width * sizes.accumulator, TEMPORARY)
        weight_gradients(tape, weights, sizes.parameter)
        del copy, block
        tape.hooks.release(weights, backward=True)
        return (given,)

    return tape.result(out, (x,), backward, (x.storage, statistics))


def gelu(tape: Tape, x: Tensor) -> Tensor:
    """Elementwise; keeps its input."""
    size = x.size
    return tape.result(tape.new(size), (x,), lambda grad: (tape.new(size, GRADIENTS),), (x.storage,))


def add(tape: Tape, x: Tensor, y: Tensor) -> Tensor:
    """Sum of two of equal shape; both get the same gradient."""
    return tape.result(tape.new(max(x.size, y.size)), (x, y), lambda grad: (grad, grad))


def add_narrow(tape: Tape, x: Tensor, y: Tensor, given: DtypeSizes, sizes: DtypeSizes) -> Tensor:
    """Sum of x and a y that may be narrower, which a CPU widens first; y's gradient is cast back.

    Args:
        tape, x, y: the terms, and where they lie.
        given: widths of x.
        w: widths of y.
    """
    if given.value == sizes.value:
        return add(tape, x, y)
    narrow = x.size // given.value * sizes.value
    widened = tape.new(x.size if sizes.device == "cpu" else 0, TEMPORARY)
    out = tape.new(x.size)
    del widened
    return tape.result(out, (x, y), lambda grad: (grad, tape.new(narrow, GRADIENTS)))


def add_positions(tape: Tape, x: Tensor, weights: ModuleParams, sizes: DtypeSizes) -> Tensor:
    """Adds a learned (1, N, C) tensor; its gradient is the sum over the batch.

    Args:
        tape, x, weights: as in `linear`.
        w: widths of x; the sum is as wide as the parameters.
    """
    tape.hooks.fetch(weights, backward=False)
    narrow, size = x.size, x.size // sizes.value * sizes.parameter
    widened = tape.new(size if sizes.casts and sizes.device == "cpu" else 0, TEMPORARY)
    out = tape.new(size)
    del widened
    tape.hooks.release(weights, backward=False)

    def backward(grad: Storage) -> Gradients:
        tape.hooks.fetch(weights, backward=True)
        weight_gradients(tape, weights, sizes.parameter)
        tape.hooks.release(weights, backward=True)
        return (tape.new(narrow, GRADIENTS) if sizes.casts else grad,)

    return tape.result(out, (x,), backward)


def prepend(tape: Tape, x: Tensor, numel: int, weights: ModuleParams, sizes: DtypeSizes) -> Tensor:
    """Joins a learned token before the others into so many values; x's gradient is a view."""
    tape.hooks.fetch(weights, backward=False)
    out = tape.new(numel * sizes.value)
    tape.hooks.release(weights, backward=False)

    def backward(grad: Storage) -> Gradients:
        tape.hooks.fetch(weights, backward=True)
        weight_gradients(tape, weights, sizes.parameter)
        tape.hooks.release(weights, backward=True)
        return (grad,)

    return tape.result(out, (x,), backward)


def embed(tape: Tape, rows: int, width: int, weights: ModuleParams, indices: Storage, sizes: DtypeSizes) -> Tensor:
    """Looks up (rows,) numbers in a table; keeps the numbers, and its gradient is dense."""
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
    """The class token of every sample, a view; backward fills a gradient for all tokens."""
    size = x.size
    return tape.result(x.storage, (x,), lambda grad: (tape.new(size, GRADIENTS),))


def pool_mean(tape: Tape, x: Tensor, size: int, sizes: DtypeSizes) -> Tensor:
    """The mean over tokens, of so many bytes; backward divides an expanded gradient."""
    whole = x.size
    out = tape.new(size)
    if sizes.device == "cpu" and sizes.value < sizes.accumulator:
        # A CPU widens the whole input to sum it.
        tape.new(x.size // sizes.value * sizes.accumulator + size // sizes.value * sizes.accumulator, TEMPORARY)
    return tape.result(out, (x,), lambda grad: (tape.new(whole, GRADIENTS),))


def cast(tape: Tape, x: Tensor, numel: int, before: DtypeSizes, after: DtypeSizes) -> Tensor:
    """So many values in another width; the tensor itself where it has that width already."""
    if before.value == after.value:
        return x
    size = numel * before.value
    return tape.result(tape.new(numel * after.value), (x,), lambda grad: (tape.new(size, GRADIENTS),))


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


def dropout(tape: Tape, x: Tensor, sizes: DtypeSizes, *, last: bool = False) -> Tensor:
    """Elementwise; keeps its noise, on a CPU as wide as the values, on a GPU one byte each.

    Args:
        tape, x, w: as in `linear`.
        last: whether the noise is the last thing that is kept, so that a checkpoint stops here.
    """
    size = x.size
    noise = tape.new(size if sizes.device == "cpu" else size // sizes.value)
    tape.stopped |= last
    return tape.result(tape.new(size), (x,), lambda grad: (tape.new(size, GRADIENTS),), (noise,))
