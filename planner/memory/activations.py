"""Activations of one micro-batch, from a replay of its forward and backward pass (schedule.py).

Gradients of the parameters are left out: where they live depends on the ZeRO stage, not on the
network.
"""

from __future__ import annotations

from functools import lru_cache

from ..config.model import ModelSpec
from ..simulator.core.storage import MemoryTracker
from ..simulator.network.model import MICRO_BATCHES, Replay, replay
from ..simulator.network.ops import WEIGHT_GRADIENTS, DtypeSizes
from ..simulator.network.relation_shape import Implementation

_SHALLOW = 3
"""Layers of the deeper of two networks from which deeper ones follow."""


def _replay(spec: ModelSpec, batch: int, widths: DtypeSizes, implementation: Implementation) -> Replay:
    tables = {"translution", "alpha"} & set(spec.layer_operators)
    return _replay_tables(spec, batch, widths, implementation if tables else "grouped")


@lru_cache(maxsize=64)
def _replay_tables(spec: ModelSpec, batch: int, widths: DtypeSizes, implementation: Implementation) -> Replay:
    # Whole tables: how they are cut changes nothing but the gradients, which are left out.
    memory = MemoryTracker(ignored=frozenset({WEIGHT_GRADIENTS, MICRO_BATCHES}))
    return replay(spec, batch, widths, memory=memory, implementation=implementation)


def saved_bytes(spec: ModelSpec, batch: int, widths: DtypeSizes, implementation: Implementation = "grouped") -> int:
    """Bytes that one forward pass keeps for backward on the device, parameters left out.

    Args:
        spec: the model.
        batch: samples of one micro-batch.
        widths: of the values that are kept.
        implementation: "grouped", or "gather" for the published way.
    """
    if spec.depth <= _SHALLOW or spec.relative_layers != "all":
        return _replay(spec, batch, widths, implementation).saved_bytes
    # Layers that are alike keep the same, so that two depths tell of any.
    low, high = (
        _replay(spec.model_copy(update={"depth": depth}), batch, widths, implementation).saved_bytes
        for depth in (_SHALLOW - 1, _SHALLOW)
    )
    return high + (high - low) * (spec.depth - _SHALLOW)


def peak_bytes(spec: ModelSpec, batch: int, widths: DtypeSizes, implementation: Implementation = "grouped") -> int:
    """Most activations, their gradients and scratch that are live in one forward and backward pass.

    Args:
        spec, batch, widths, implementation: as in `saved_bytes`.
    """
    peaks = _replay(spec, batch, widths, implementation).memory.peaks
    return max(peaks[phase].total_bytes for phase in ("forward", "backward"))
