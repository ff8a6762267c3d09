"""Formulas and sources of what FSDP2 holds, by the name of the breakdown's item."""

from __future__ import annotations

from ..simulator.engine import base as names
from ..simulator.network.ops import WEIGHT_GRADIENTS

_FSDP2 = "torch distributed/fsdp/_fully_shard"
FSDP2_ITEMS: dict[str, tuple[str, str]] = {
    names.PARAMETERS: ("fp32, 1/ranks of each tensor's first dimension, padded", f"{_FSDP2}/_fsdp_param.py"),
    names.OPTIMIZER_STATES: ("fp32 m and v of adamw, of a rank's share", "torch/optim"),
    names.SHARED_GRADIENTS: ("fp32 gradients of a rank's share, until the step", f"{_FSDP2}/_fsdp_collectives.py"),
    names.GATHERED: ("full parameters of the tile or block that runs", f"{_FSDP2}/_fsdp_param_group.py"),
    names.GATHER_COPIES: ("the buffer of a gather, in forward until the next one", f"{_FSDP2}/_fsdp_collectives.py"),
    names.REDUCE_COPIES: ("gradients joined for the newest reduction", f"{_FSDP2}/_fsdp_collectives.py"),
    names.STREAMS: ("two gathers that wait for another stream; an upper bound", f"{_FSDP2}/_fsdp_param_group.py"),
    names.CONSTRUCTION_TENSORS: ("fp32 tensors of modules that are not yet sharded", f"{_FSDP2}/_fsdp_param.py"),
    WEIGHT_GRADIENTS: ("full gradients of a tile or block that are not yet reduced", "torch autograd"),
}
"""Items that FSDP2 holds for other reasons than DeepSpeed."""
