"""Optimizer states per element, and the temporaries of an optimizer update.

Sources: torch 2.13, torch/optim (single-tensor loops); DeepSpeed 0.19.8, ops/adam, ops/lion and ops/adagrad, which
update in place on the host.
"""

from __future__ import annotations

from ..common.types import DTYPE_BYTES
from ..config.run_config import TrainingSpec


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


def temporary_tensors(training: TrainingSpec, *, offloaded: bool, one_by_one: bool = False) -> int:
    """Return the maximum number of temporaries, of the size of the update, that an update holds at once.

    Args:
        training: gives the optimizer.
        offloaded: whether DeepSpeed's CPU version updates.
        one_by_one: whether parameters are updated in a loop, where the previous denominator is still held.
    """
    if offloaded or training.optimizer == "lion":
        return 0
    decays = training.weight_decay > 0
    # AdamW: the square root of v, then its quotient. The others add the weight decay to a copy of the gradient.
    return {"adamw": 2 + one_by_one, "adagrad": 1 + decays, "sgd": int(decays)}[training.optimizer]


def widths(training: TrainingSpec) -> tuple[int, int]:
    """Return the bytes per element of the master parameters, and of one state tensor."""
    return DTYPE_BYTES[training.master_dtype], DTYPE_BYTES[training.states_dtype]
