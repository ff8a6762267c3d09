"""Activations of one micro-batch, from a replay of its forward and backward pass (schedule.py).

Gradients of the parameters are left out: where they live depends on the ZeRO stage, not on the
network. What the published way needs beside that is a closed form.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Literal

from .model_spec import ModelSpec, VitSpec
from .schedule import MICRO_BATCHES, Replay, replay
from .tape import Memory
from .twins import INDEX_BYTES, WEIGHT_GRADIENTS, Widths

Implementation = Literal["grouped", "gather"]


@lru_cache(maxsize=64)
def _replay(spec: ModelSpec, batch: int, widths: Widths) -> Replay:
    # Whole tables: how they are cut changes nothing but the gradients, which are left out.
    memory = Memory(ignored=frozenset({WEIGHT_GRADIENTS, MICRO_BATCHES}))
    return replay(spec, batch, widths, memory=memory)


def _gathered_bytes(spec: ModelSpec, batch: int, widths: Widths) -> tuple[int, int]:
    """Kept by the published way for all its relative roles, and the matrices of every pair for one role.

    It keeps matrices, rows and products of every pair. Source: measured on a layer of ViT-A/56,
    123.2 MiB per sample.
    """
    kept = largest = 0
    pairs, roles = batch * spec.tokens**2, len(spec.roles)
    for operator in spec.layer_operators:
        if operator not in ("translution", "alpha"):
            continue
        d_in, d_out = (spec.dim, spec.inner_dim) if operator == "translution" else spec.low_dims
        operands = (2 if set("qk") & set(spec.roles) else 0) + ("v" in spec.roles)
        one_role = pairs * d_in * d_out * widths.value
        kept += roles * one_role + (roles * d_in + operands * d_out) * pairs * widths.value
        largest = max(largest, one_role)
    return kept, largest


def sample_bytes(spec: ModelSpec) -> int:
    """Bytes of one sample's input and target: an fp32 image and its class, or token numbers."""
    if isinstance(spec, VitSpec):
        return spec.channels * spec.image[0] * spec.image[1] * 4 + INDEX_BYTES
    return 2 * spec.tokens * INDEX_BYTES


def kept_bytes(spec: ModelSpec, batch: int, widths: Widths, implementation: Implementation = "grouped") -> int:
    """Bytes that one forward pass keeps for backward on the device, parameters left out.

    Args:
        spec: the model.
        batch: samples of one micro-batch.
        widths: of the values that are kept.
        implementation: "grouped", or "gather" for the published way.
    """
    gathered = _gathered_bytes(spec, batch, widths)[0] if implementation == "gather" else 0
    return _replay(spec, batch, widths).kept_bytes + gathered


def peak_bytes(spec: ModelSpec, batch: int, widths: Widths, implementation: Implementation = "grouped") -> int:
    """Most activations, their gradients and scratch that are live in one forward and backward pass.

    Args:
        spec, batch, widths, implementation: as in `kept_bytes`.
    """
    peaks = _replay(spec, batch, widths).memory.peaks
    peak = max(peaks[phase].total_bytes for phase in ("forward", "backward"))
    if implementation == "gather":
        kept, one_role = _gathered_bytes(spec, batch, widths)
        # Backward makes the gradient of one role's matrices, and gathers them once more.
        peak += kept + 2 * one_role
    return peak
