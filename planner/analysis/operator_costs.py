"""What a model costs before it has a cluster: parameters, operations, and what a forward pass keeps."""

from __future__ import annotations

from typing import Any

from ..common.errors import InputError
from ..config.model import OPERATORS, ModelSpec, Operator, parse_model_spec
from ..costs.flops import count_flops
from ..costs.parameters import count_parameters
from ..memory.activations import saved_bytes
from ..simulator.network.ops import DtypeSizes

STATE_BYTES = 16
"""Of AdamW in fp32 for each parameter: itself, its gradient and two moments."""
LABELS = {
    "translution": "full Translution",
    "alpha": "α-Translution",
    "attention": "attention",
    "bias": "attention, scalars",
    "shaw": "attention, vectors",
    "absolute": "absolute matrices",
}
"""Operators in words."""


def describe(spec: ModelSpec, micro_batch: int, widths: DtypeSizes) -> dict[str, Any]:
    """Costs of one model: parameters, operations and activations, published way and ours.

    Args:
        spec: the model.
        micro_batch: samples of a forward pass.
        widths: bytes of its values.
    """
    parameters, flops = count_parameters(spec), count_flops(spec)
    published = saved_bytes(spec, micro_batch, widths, "gather")
    return {
        "operator": spec.operator,
        "parameters": parameters.model_dump(),
        "training_state_bytes": parameters.total * STATE_BYTES,
        "activations_bytes": {"published": published, "ours": saved_bytes(spec, micro_batch, widths)},
        "flops_per_sample": flops.model_dump(),
    }


def with_operator(spec: ModelSpec, operator: Operator) -> ModelSpec | None:
    """The model with another operator, or None where that operator does not allow its other fields."""
    if operator == spec.operator:
        return spec
    try:
        fields = spec.model_dump() | {"operator": operator}
        fields["rotary"] = spec.rotary and operator in ("attention", "alpha")
        if operator in ("attention", "absolute"):
            fields["window"] = None
        return parse_model_spec(fields)
    except InputError:
        return None


def compare_operators(spec: ModelSpec, micro_batch: int, widths: DtypeSizes) -> list[dict[str, Any]]:
    """`describe` of a model with its own operator, then with each of the others that it allows."""
    order: tuple[Operator, ...] = (spec.operator, *(name for name in OPERATORS if name != spec.operator))
    return [describe(other, micro_batch, widths) for name in order if (other := with_operator(spec, name))]
