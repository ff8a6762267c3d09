"""What an optimizer keeps for every element it updates, and the temporaries of its update.

Sources: torch 2.13, torch/optim (single-tensor loops); DeepSpeed 0.19.8, ops/adam, ops/lion and ops/adagrad, which
update in place on the host.
"""

from __future__ import annotations

from ..config.training import DTYPE_BYTES, TrainingSpec


def moments(training: TrainingSpec) -> int:
    """Tensors as large as the parameters that the optimizer keeps."""
    if training.optimizer == "adamw":
        return 2
    return int(training.optimizer != "sgd" or training.momentum > 0)


def state_name(training: TrainingSpec) -> str:
    """What those tensors are."""
    return {
        "adamw": "m and v",
        "lion": "the momentum",
        "adagrad": "the sum of squares",
        "sgd": "the momentum" if training.momentum > 0 else "nothing",
    }[training.optimizer]


def temporary_tensors(training: TrainingSpec, *, offloaded: bool, one_by_one: bool = False) -> int:
    """Tensors of the updated size that live beside one another at the worst moment of an update.

    Args:
        training: names the optimizer.
        offloaded: whether the host's own version updates it.
        one_by_one: whether parameters are updated in a loop, where the last one's denominator is still held.
    """
    if offloaded or training.optimizer == "lion":
        return 0
    decays = training.weight_decay > 0
    # AdamW: the square root of v, then that divided. Others add the decay to a copy of the gradient.
    return {"adamw": 2 + one_by_one, "adagrad": 1 + decays, "sgd": int(decays)}[training.optimizer]


def widths(training: TrainingSpec) -> tuple[int, int]:
    """Bytes per element of the master copy, and of a moment."""
    return DTYPE_BYTES[training.master_dtype], DTYPE_BYTES[training.states_dtype]
