"""Activations of one micro-batch: bytes saved for backward, and the peak of forward and backward.

Both come from a replay of the network (simulator/network/model.py). Parameter gradients are excluded: their place
depends on the ZeRO stage, not on the network.
"""

from __future__ import annotations

from functools import lru_cache

from ..config.model import ModelSpec
from ..simulator.core.storage import MemoryTracker
from ..simulator.network.model import MICRO_BATCHES, Replay, replay
from ..simulator.network.ops import WEIGHT_GRADIENTS, DtypeSizes
from ..simulator.network.relation_shape import Implementation

_SHALLOW = 3
"""Depth of the deeper of the two networks from which other depths are extrapolated."""


def _replay(spec: ModelSpec, batch: int, sizes: DtypeSizes, implementation: Implementation) -> Replay:
    tables = {"translution", "alpha"} & set(spec.layer_operators)
    return _replay_tables(spec, batch, sizes, implementation if tables else "grouped")


@lru_cache(maxsize=64)
def _replay_tables(spec: ModelSpec, batch: int, sizes: DtypeSizes, implementation: Implementation) -> Replay:
    # Full tables: tiles would change only the gradients, which are excluded.
    memory = MemoryTracker(ignored=frozenset({WEIGHT_GRADIENTS, MICRO_BATCHES}))
    return replay(spec, batch, sizes, memory=memory, implementation=implementation)


def saved_bytes(spec: ModelSpec, batch: int, sizes: DtypeSizes, implementation: Implementation = "grouped") -> int:
    """Bytes that one forward pass keeps for backward on the device, parameters left out.

    Args:
        spec: the model.
        batch: samples of one micro-batch.
        sizes: bytes per value.
        implementation: "grouped", or "gather" for the published code.
    """
    if spec.depth <= _SHALLOW or spec.relative_layers != "all":
        return _replay(spec, batch, sizes, implementation).saved_bytes
    # Equal layers save equal bytes, so that two depths determine all others.
    low, high = (
        _replay(spec.model_copy(update={"depth": depth}), batch, sizes, implementation).saved_bytes
        for depth in (_SHALLOW - 1, _SHALLOW)
    )
    return high + (high - low) * (spec.depth - _SHALLOW)


def peak_bytes(spec: ModelSpec, batch: int, sizes: DtypeSizes, implementation: Implementation = "grouped") -> int:
    """Peak bytes of activations, their gradients and scratch in one forward and backward pass.

    Args:
        spec, batch, sizes, implementation: as in `saved_bytes`.
    """
    peaks = _replay(spec, batch, sizes, implementation).memory.peaks
    return max(peaks[phase].total_bytes for phase in ("forward", "backward"))
