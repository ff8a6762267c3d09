"""Bytes of optimizer states and temporaries.

Sources: torch 2.13, torch/optim (single-tensor loops); DeepSpeed 0.19.8, ops/adam, ops/lion and ops/adagrad, which
update in place on the host; bitsandbytes 0.50, optim/optimizer.py and backends/cpu/ops.py (arXiv 2110.02861).
"""

from __future__ import annotations

from ..common.types import DTYPE_BYTES
from ..common.units import FP32_BYTES
from ..config.training import TrainingSpec

QUANTIZED_BLOCK = 256
"""Elements of a quantized moment that share a scale in fp32."""
SMALLEST_QUANTIZED = 4096
"""Elements of the smallest tensor whose moments bitsandbytes quantizes; those of smaller ones are fp32."""
CODEBOOK_BYTES = 2 * 256 * FP32_BYTES
"""Bytes of the values that the codes of m and of v stand for, which all tensors share."""


def state_tensors(training: TrainingSpec) -> int:
    """Return the number of state tensors, each with as many elements as the parameters, that the optimizer has."""
    if training.optimizer == "adamw":
        return 2
    return int(training.optimizer != "sgd" or training.momentum > 0)


def state_name(training: TrainingSpec) -> str:
    """Return the name of the optimizer's state tensors."""
    return {
        "adamw": "m and v",
        "lion": "the momentum",
        "adagrad": "the sum of squares",
        "sgd": "the momentum" if training.momentum > 0 else "nothing",
    }[training.optimizer]


def temporary_tensors(
    training: TrainingSpec, *, on_cpu: bool, offloaded: bool, one_by_one: bool = False, backup: bool = False
) -> int:
    """Return the maximum number of temporaries, of the size of the update, that an update holds at once.

    Args:
        training: gives the optimizer.
        on_cpu: whether the ranks' device is the CPU.
        offloaded: whether DeepSpeed's CPU version updates.
        one_by_one: whether parameters are updated in a loop, where the previous denominator is still held.
        backup: whether torch's AdamW updates what a partial offload leaves on the device; it is never a fused one.
    """
    if offloaded or training.optimizer == "lion" or (training.adam in ("fused", "torch") and not backup):
        return 0
    if training.quantizes_states:
        # On a CPU bitsandbytes holds both moments in fp32, a copy of the gradient, the square root of v and its
        # quotient.
        return 5 * on_cpu
    decays = training.weight_decay > 0
    # AdamW: the square root of v, then its quotient. The others add the weight decay to a copy of the gradient.
    return {"adamw": 2 + one_by_one, "adagrad": 1 + decays, "sgd": int(decays)}[training.optimizer]


def widths(training: TrainingSpec) -> tuple[int, int]:
    """Return the bytes per element of the master parameters, and of one state tensor."""
    return DTYPE_BYTES[training.master_dtype], DTYPE_BYTES[training.states_dtype]


def state_bytes(training: TrainingSpec, numel: int) -> int:
    """Return the bytes of the optimizer states of one tensor that is updated at once, without `CODEBOOK_BYTES`.

    Args:
        training: gives the optimizer.
        numel: elements of the tensor: of a parameter at stage 0, else of a flat partition.
    """
    width = widths(training)[1]
    if training.quantizes_states:
        width = FP32_BYTES
        if numel >= SMALLEST_QUANTIZED:
            return 2 * (numel + -(-numel // QUANTIZED_BLOCK) * FP32_BYTES)
    return numel * width * state_tensors(training)


def most_state_bytes(training: TrainingSpec, numel: int, tensors: int, small_tensors: int) -> int:
    """Return an upper bound of the bytes of the optimizer states of several tensors.

    Args:
        training: gives the optimizer.
        numel: elements of all tensors.
        tensors: number of tensors, at most.
        small_tensors: number of those that are smaller than `SMALLEST_QUANTIZED`, at most.
    """
    if not training.quantizes_states:
        return state_bytes(training, numel)
    small = min(numel, small_tensors * SMALLEST_QUANTIZED)
    blocks = numel // QUANTIZED_BLOCK + tensors
    return CODEBOOK_BYTES + 2 * (numel + blocks * FP32_BYTES) + 2 * (FP32_BYTES - 1) * small
