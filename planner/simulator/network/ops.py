"""Simulation of torch's operations: what each one allocates, saves and frees in forward and backward.

Rows are the tokens of the micro-batch. Source: events of torch 2.13's allocator, operation by operation;
`tests/planner/simulator/test_lifecycle.py` compares full training steps with them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ...config.run_config import RunConfig
from ...config.training import TrainingSpec
from ..core import Backward, Gradients, ModuleParams, Storage, Tape, Tensor

ACTIVATIONS, GRADIENTS, WEIGHT_GRADIENTS = "activations", "activation gradients", "whole gradients"
TEMPORARY, CASTS = "temporaries of one operation", "cast parameters"
ATTENTION_WEIGHTS = "attention weights"
INDEX_BYTES = 8
"""Bytes of a class or token id: int64."""


@dataclass(frozen=True, slots=True)
class DtypeSizes:
    """Bytes per value of a run's tensors, and the properties of the device on which allocations depend."""

    value: int
    """Bytes of an activation or its gradient; under autocast, of the operands of products."""
    parameter: int
    """Bytes of a parameter or its gradient: as `value`, except under autocast."""
    statistic: int
    """Bytes of LayerNorm's mean or deviation: the model's dtype on a CPU, at least fp32 on a GPU."""
    accumulator: int = 4
    """Bytes of a sum over relations or a softmax value: at least fp32."""
    device: str = "cpu"
    """"cpu" or "cuda"."""
    threads: int = 1
    """CPU threads; each one has its own scratch blocks."""
    packs: bool = True
    """Whether the CPU packs the matrices of half-precision products: with AVX-512; other CPUs need no scratch."""
    batched: bool = False
    """Whether the operator multiplies many relations at a time, as on a GPU."""
    fused: bool = False
    """Whether the GPU's fused kernels compute the operator, where they serve (models/ops/implementations.py)."""
    copies_products: bool = False
    """Whether gradients of a tile's matrices are first made in another tensor, as by a GPU's grouped product."""
    recasts: bool = False
    """Whether linear layers cast their operands for each product and save none of the casts: those of DeepSpeed at ZeRO
    stage 3, under autocast."""

    @classmethod
    def of(cls, dtype_bytes: int, device: str, threads: int = 1, *, packs: bool = True) -> DtypeSizes:
        """Return the sizes for a model dtype of ``dtype_bytes`` bytes on "cpu" or "cuda"."""
        wide = max(4, dtype_bytes)
        statistic, gpu = dtype_bytes if device == "cpu" else wide, device == "cuda"
        return cls(dtype_bytes, dtype_bytes, statistic, wide, device, threads, packs, batched=gpu, copies_products=gpu)

    @classmethod
    def autocast(cls, device: str, threads: int = 1, *, packs: bool = True) -> DtypeSizes:
        """Return the sizes for fp32 parameters under `torch.autocast` to bf16 or fp16 on "cpu" or "cuda"."""
        gpu = device == "cuda"
        return cls(2, 4, 4, 4, device, threads, packs, batched=gpu, copies_products=gpu)

    @classmethod
    def of_training(
        cls, training: TrainingSpec, device: str, threads: int = 1, *, packs: bool = True, stage: int = 0
    ) -> DtypeSizes:
        """Return the sizes for a training on "cpu" or "cuda" at a ZeRO stage."""
        if training.torch_autocast:
            return replace(cls.autocast(device, threads, packs=packs), recasts=stage == 3)
        return cls.of(training.dtype_bytes, device, threads, packs=packs)

    @classmethod
    def of_run(cls, run: RunConfig, threads: int = 1) -> DtypeSizes:
        """Return the sizes for a run on its own device."""
        sizes = cls.of_training(run.training, run.cluster.device, threads, stage=run.zero.stage)
        return replace(sizes, fused=run.cluster.has_fused_kernels)

    @property
    def casts(self) -> bool:
        """Whether products cast their operands: True under autocast."""
        return self.value != self.parameter

    @property
    def wide(self) -> DtypeSizes:
        """Sizes for operations that autocast runs in the parameter dtype."""
        return replace(self, value=self.parameter)


def product_scratch_bytes(rows: int, inner: int, cols: int, sizes: DtypeSizes, *, transposed: bool = False) -> int:
    """Return an upper bound of the scratch bytes of a half-precision product on a CPU; 0 elsewhere.

    Per thread, oneDNN packs blocks of both matrices and sums in fp32. Its block sizes depend on the processor: the
    kernels for AVX-512 pack 64 columns and sum up to 256 rows; those for AMX pack the right matrix as long as it fits
    the L2 cache, and sum the full result if they split a long inner dimension. A transposed left matrix, and one
    whose rows are no multiple of 64 bytes, is copied. The bound errs high. Source: measured with torch 2.13 and
    oneDNN 3.12 under `ONEDNN_MAX_CPU_ISA` AVX512_CORE_BF16 and AVX512_CORE_AMX, 4026 products with 1 and 4 threads.
    """
    if sizes.device != "cpu" or sizes.value >= sizes.accumulator or not sizes.packs:
        return 0
    inner_padded, block = _pad(inner, 32), min(_pad(cols, 16), 64)
    avx512 = 2 * inner_padded * 64 + 4 * min(rows, 256) * block
    amx = min(2 * inner_padded * _pad(cols, 64), 3 * 2**19)
    packed = max(avx512, amx) + 8192
    if transposed:
        return sizes.threads * (packed + min(2 * _pad(rows, 64) * _pad(inner, 64), 5 * 2**18) + 20480)
    copied = 2 * min(rows, 64) * inner_padded if inner % 32 else 0
    return sizes.threads * (packed + copied) + (4 * rows * cols if inner > 2048 else 0)


def _pad(number: int, multiple: int) -> int:
    """Return the smallest multiple that is at least ``number``."""
    return -(-number // multiple) * multiple


def weight_gradients(tape: Tape, weights: ModuleParams, width: int) -> None:
    """Allocate the gradients of a module's parameters and pass them to the engine."""
    pass_gradients(tape, weights, [tape.new(numel * width, WEIGHT_GRADIENTS) for numel in weights.numels])


def pass_gradients(tape: Tape, weights: ModuleParams, grads: list[Storage]) -> None:
    """Pass the gradients of a module's parameters to the engine.

    Parameters that two modules share are passed once: autograd holds the gradients of the first module until it has
    added those of the second. The list holds the only reference to each gradient, and is empty afterwards.
    """
    if weights.shared and not weights.waiting:
        weights.waiting = list(grads)
        grads.clear()
        return
    if weights.shared:
        grads[:], weights.waiting = weights.waiting, []
    if tape.hooks.averages_over_group:
        for number in range(len(grads)):
            grads[number] = tape.new(grads[number].size, WEIGHT_GRADIENTS)
    tape.hooks.gradients(weights, grads)


def accumulate_gradients(tape: Tape, weights: ModuleParams, grads: list[Storage]) -> None:
    """Pass the gradients to the engine, and release the parameters, when what the operation has saved is freed.

    The list holds the only reference to each gradient.
    """

    def accumulate() -> None:
        pass_gradients(tape, weights, grads)
        tape.hooks.release(weights, backward=True)

    tape.after(accumulate)


def cast_parameters(tape: Tape, weights: ModuleParams, sizes: DtypeSizes) -> list[Tensor]:
    """Return casts of a module's parameters for its products; an empty list without autocast.

    Autocast caches the casts until its context ends, and makes them from the last argument of a call to the first.
    """
    if not sizes.casts:
        return []
    found: dict[int, Storage] = {}

    def cast_back(number: int, numel: int) -> Backward:
        def backward(grad: Storage) -> Gradients:
            found[number] = tape.new(numel * sizes.parameter, WEIGHT_GRADIENTS)
            if len(found) == len(weights.numels):
                pass_gradients(tape, weights, [found.pop(n) for n in range(len(weights.numels))])
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
    """Apply a linear layer, (rows, d_in) → (rows, d_out); saves its input, and under autocast the cast weight.

    Args:
        tape: records the operation.
        x: the input.
        rows, d_in, d_out: shape of the product.
        weights: parameters of the module.
        sizes: bytes per value.
        given: sizes of the input if they differ; autocast casts it.
        last: whether the input is the last tensor that a recomputed block saves, so that recomputation stops here.
    """
    if sizes.recasts:
        return _recasting_linear(tape, x, (rows, d_in, d_out), weights, sizes, given or sizes, last=last)
    tape.hooks.fetch(weights, backward=False)
    casts = cast_parameters(tape, weights, sizes)
    x = cast(tape, x, rows * d_in, given or sizes, sizes)
    tape.stopped |= last
    out = tape.new(rows * d_out * sizes.value)
    tape.new(product_scratch_bytes(rows, d_in, d_out, sizes), TEMPORARY)
    kept = tape.kept_weights(weights)
    if not last:
        # torch's checkpoint ends the recomputation before the module's hook that releases its parameters.
        tape.hooks.release(weights, backward=False)
    wanted = x.node is not None

    def backward(grad: Storage) -> Gradients:
        tape.hooks.fetch(weights, backward=True)
        given = tape.new(rows * d_in * sizes.value, GRADIENTS) if wanted else None
        tape.new(product_scratch_bytes(rows, d_out, d_in, sizes) if wanted else 0, TEMPORARY)
        what = GRADIENTS if casts_back else WEIGHT_GRADIENTS
        grads = [tape.new(numel * sizes.value, what) for numel in weights.numels]
        tape.new(product_scratch_bytes(d_out, rows, d_in, sizes, transposed=True), TEMPORARY)
        if casts_back:
            tape.hooks.release(weights, backward=True)
            return (given, *grads)
        accumulate_gradients(tape, weights, grads)
        return (given,)

    casts_back = len(casts)
    saved = (x.storage, *kept, *(copy.storage for copy in casts[:1]))
    del kept
    return tape.result(out, (x, *casts), backward, saved)


def _recasting_linear(
    tape: Tape,
    x: Tensor,
    shape: tuple[int, int, int],
    weights: ModuleParams,
    sizes: DtypeSizes,
    given: DtypeSizes,
    *,
    last: bool,
) -> Tensor:
    """Apply DeepSpeed's linear layer for ZeRO-3 under autocast (runtime/zero/linear.py); saves its input as given."""
    rows, d_in, d_out = shape
    narrows = given.value != sizes.value
    tape.hooks.fetch(weights, backward=False)
    casts = [tape.new(rows * d_in * sizes.value if narrows else 0, CASTS)]
    casts.append(tape.new(d_in * d_out * sizes.value, CASTS))
    out = tape.new(rows * d_out * sizes.value)
    tape.new(product_scratch_bytes(rows, d_in, d_out, sizes), TEMPORARY)
    del casts
    if len(weights.numels) > 1 and sizes.device == "cpu":
        # A CPU adds the bias in fp32: it widens the result, and makes the sum in another tensor.
        tape.new(2 * rows * d_out * sizes.parameter, TEMPORARY)
    saved = (x.storage, *tape.kept_weights(weights))
    tape.stopped |= last
    if not last:
        tape.hooks.release(weights, backward=False)
    wanted = x.node is not None

    def backward(grad: Storage) -> Gradients:
        tape.hooks.fetch(weights, backward=True)
        casts = [tape.new(d_in * d_out * sizes.value if wanted else 0, CASTS)]
        given_grad = tape.new(rows * d_in * sizes.value, GRADIENTS) if wanted else None
        tape.new(product_scratch_bytes(rows, d_out, d_in, sizes) if wanted else 0, TEMPORARY)
        casts.append(tape.new(rows * d_in * sizes.value if narrows else 0, CASTS))
        grads = [tape.new(numel * sizes.value, WEIGHT_GRADIENTS) for numel in weights.numels]
        tape.new(product_scratch_bytes(d_out, rows, d_in, sizes, transposed=True), TEMPORARY)
        casts.clear()
        # Autograd casts each gradient to the dtype of its tensor.
        if wanted and narrows:
            given_grad = tape.new(rows * d_in * given.value, GRADIENTS)
        for number, numel in enumerate(weights.numels):
            grads[number] = tape.new(numel * sizes.parameter, WEIGHT_GRADIENTS)
        accumulate_gradients(tape, weights, grads)
        return (given_grad,)

    return tape.result(out, (x,), backward, saved)


def gelu(tape: Tape, x: Tensor) -> Tensor:
    """Apply GELU or SiLU elementwise; saves its input."""
    size = x.size
    return tape.result(tape.new(size), (x,), lambda grad: (tape.new(size, GRADIENTS),), (x.storage,))


def multiply(tape: Tape, x: Tensor, y: Tensor) -> Tensor:
    """Multiply two tensors of equal shape; saves both."""
    size = x.size
    grads = (GRADIENTS, GRADIENTS)
    return tape.result(
        tape.new(size), (x, y), lambda grad: [tape.new(size, what) for what in grads], (x.storage, y.storage)
    )


def add(tape: Tape, x: Tensor, y: Tensor) -> Tensor:
    """Add two tensors of equal shape; both get the same gradient storage."""
    return tape.result(tape.new(max(x.size, y.size)), (x, y), lambda grad: (grad, grad))


def add_narrow(tape: Tape, x: Tensor, y: Tensor, given: DtypeSizes, sizes: DtypeSizes) -> Tensor:
    """Add x and y, where y may have a narrower dtype: a CPU widens y first, and y's gradient is cast back.

    Args:
        tape: records the operation.
        x, y: the terms.
        given: sizes of x.
        sizes: sizes of y.
    """
    if given.value == sizes.value:
        return add(tape, x, y)
    narrow = x.size // given.value * sizes.value
    widened = tape.new(x.size if sizes.device == "cpu" else 0, TEMPORARY)
    out = tape.new(x.size)
    del widened
    return tape.result(out, (x, y), lambda grad: (grad, tape.new(narrow, GRADIENTS)))


def add_positions(tape: Tape, x: Tensor, weights: ModuleParams, sizes: DtypeSizes) -> Tensor:
    """Add a learned (1, N, C) tensor, whose gradient is the sum over the batch.

    Args:
        tape, x, weights: as in `linear`.
        sizes: sizes of x; the sum has the parameter dtype.
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
    """Prepend a learned token, to ``numel`` values in all; x's gradient is a view."""
    tape.hooks.fetch(weights, backward=False)
    out = tape.new(numel * sizes.value)
    tape.hooks.release(weights, backward=False)

    def backward(grad: Storage) -> Gradients:
        tape.hooks.fetch(weights, backward=True)
        weight_gradients(tape, weights, sizes.parameter)
        tape.hooks.release(weights, backward=True)
        return (grad,)

    return tape.result(out, (x,), backward)


def cast(tape: Tape, x: Tensor, numel: int, before: DtypeSizes, after: DtypeSizes) -> Tensor:
    """Cast ``numel`` values from the size ``before`` to ``after``; return the tensor itself if both are equal."""
    if before.value == after.value:
        return x
    size = numel * before.value
    return tape.result(tape.new(numel * after.value), (x,), lambda grad: (tape.new(size, GRADIENTS),))


def dropout(tape: Tape, x: Tensor, sizes: DtypeSizes, *, last: bool = False) -> Tensor:
    """Apply dropout elementwise; saves its mask: as wide as the values on a CPU, one byte per value on a GPU.

    Args:
        tape, x, sizes: as in `linear`.
        last: whether the mask is the last tensor that a recomputed block saves, so that recomputation stops here.
    """
    size = x.size
    mask = tape.new(size if sizes.device == "cpu" else size // sizes.value)
    tape.stopped |= last
    return tape.result(tape.new(size), (x,), lambda grad: (tape.new(size, GRADIENTS),), (mask,))
