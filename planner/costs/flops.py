"""Floating-point operations (FLOPs) of a model's matrix products per sample, in closed form.

Source: arXiv 2510.10060, section 3: a relative role costs 2·ΣP(r)·C·C' FLOPs, however its pairs are grouped.
"""

from __future__ import annotations

from ..common.schema import Schema
from ..config.model import GptSpec, ModelSpec, Operator, VitSpec


class FlopCount(Schema):
    """FLOPs per sample; a multiply-add counts as two."""

    forward: int
    """FLOPs of a forward pass."""
    training_step: int
    """FLOPs of forward and backward; grouped operators recompute their rows in backward."""


def _operator_forward(spec: ModelSpec, operator: Operator) -> tuple[int, int]:
    """Return (plain, grouped) forward FLOPs of one operator with its output projection."""
    tokens, dim, inner = spec.tokens, spec.dim, spec.inner_dim
    pairs_product = 2 * tokens * tokens * inner
    rows = spec.geometry.table_rows
    relative = len(spec.roles)
    plain = 2 * tokens * inner * dim if spec.has_output_projection else 0
    grouped = 0
    logits_relative = bool({"q", "k"} & set(spec.roles))
    if operator in ("attention", "bias", "shaw", "absolute"):
        # A matrix per position costs as much as one for all; shaw multiplies vectors with every pair twice.
        plain += 2 * tokens * dim * 3 * inner + (4 if operator == "shaw" else 2) * pairs_product
    elif operator == "translution":
        plain += 2 * tokens * dim * inner * (3 - relative)
        plain += pairs_product * ((not logits_relative) + ("v" not in spec.roles))
        grouped = relative * 2 * rows * dim * inner
    else:
        low1, low2 = spec.heads * spec.c1, spec.heads * spec.c2
        plain += 2 * tokens * dim * (3 * inner + relative * low1) + 2 * pairs_product
        if len({"q", "k"} & set(spec.roles)) == 1:
            plain += 2 * tokens * dim * low2
        if "v" in spec.roles:
            plain += 2 * tokens * low2 * inner
        grouped = relative * 2 * rows * low1 * low2
    return plain, grouped


def count_flops(spec: ModelSpec) -> FlopCount:
    """Count the FLOPs of the matrix products of one sample.

    The backward of a plain product is two products of the same size; that of a grouped product is three, because
    queries, keys and values are recomputed. Softmax, norms and activation functions are not counted.
    """
    tokens, dim = spec.tokens, spec.dim
    plain = spec.depth * 4 * tokens * dim * spec.ffn_dim
    grouped = 0
    if isinstance(spec, VitSpec):
        plain += 2 * spec.geometry.patches * spec.patch_dim * dim + 2 * dim * spec.classes
    else:
        assert isinstance(spec, GptSpec)
        plain += 2 * tokens * dim * spec.vocabulary
    for operator in spec.layer_operators:
        more_plain, more_grouped = _operator_forward(spec, operator)
        plain, grouped = plain + more_plain, grouped + more_grouped
    return FlopCount(forward=plain + grouped, training_step=3 * plain + 4 * grouped)
