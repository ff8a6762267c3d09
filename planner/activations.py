"""What one forward pass keeps for backward, to the byte, and what is allocated for a moment.

A tensor that several modules keep is counted once. The formulas follow this project's layers
(models/layers.py, models/networks.py) and what torch's own functions save: LayerNorm its input, a
mean and a reciprocal deviation per row; Linear and GELU their input; fused attention q, k, v, its
output and a log-sum per row; log-softmax its output.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .model_spec import ModelSpec, Operator, VitSpec
from .relations import RelationGeometry

Implementation = Literal["grouped", "gather"]

WORKSPACE_BYTES = 256 * 2**20
_TARGET_BYTES = 8  # Class and token numbers are int64.


@dataclass(frozen=True, slots=True)
class Precision:
    """Widths of what is kept, in bytes."""

    value: int
    """An activation."""
    statistic: int
    """LayerNorm's mean and deviation: the model's dtype on a CPU, fp32 on a GPU."""
    accumulator: int = 4
    """Sums over relations and softmax: at least fp32."""
    host_apart: bool = True
    """Whether host memory is another than the device's."""

    @classmethod
    def of(cls, dtype_bytes: int, device: str) -> Precision:
        """The widths for a model dtype of so many bytes on "cpu" or "cuda"."""
        cpu, wide = device == "cpu", max(4, dtype_bytes)
        return cls(dtype_bytes, dtype_bytes if cpu else wide, wide, host_apart=not cpu)


@dataclass(frozen=True, slots=True)
class Stage:
    """A part of the network: what it keeps, and its largest momentary need in each direction."""

    name: str
    kept_bytes: int
    forward_bytes: int
    """Beyond what is kept, at the worst moment of its forward."""
    backward_bytes: int
    """Beyond everything kept up to it, at the worst moment of its backward."""
    copies: int = 1


def _norm(rows: int, width: int, precision: Precision) -> int:
    return rows * (width * precision.value + 2 * precision.statistic)


def _gathered_bytes(spec: ModelSpec, batch: int, precision: Precision, d_in: int, d_out: int) -> int:
    """Kept by the published way for its relative roles: matrices, rows and products of every pair.

    Source: measured on a layer of ViT-A/56, 123.2 MiB per sample.
    """
    pairs = batch * spec.tokens**2
    roles = len(spec.roles)
    matrices = roles * pairs * d_in * d_out
    rows = roles * pairs * d_in
    logit_operands = 2 if set("qk") & set(spec.roles) else 0
    products = (logit_operands + ("v" in spec.roles)) * pairs * d_out
    return (matrices + rows + products) * precision.value


def workspace_bytes(geometry: RelationGeometry, batch: int, d_in: int, d_out: int, value_bytes: int) -> int:
    """Scratch memory of a grouped operator (models/context.py: Workspace)."""
    row = 2 * (d_in + d_out)
    rows = max(geometry.width, min(batch * geometry.patches, WORKSPACE_BYTES // (row * value_bytes)))
    return rows * row * value_bytes


def _operator(spec: ModelSpec, operator: Operator, batch: int, p: Precision, implementation: Implementation) -> Stage:
    """Kept beyond the operator's input (which the norm before it gives), with the output projection."""
    tokens, inner, heads = spec.tokens, spec.inner_dim, spec.heads
    rows, weights = batch * tokens, batch * heads * tokens * tokens
    out = rows * inner * p.value
    if operator == "attention":
        projections = 3 * rows * inner * p.value
        kept = projections + out + batch * heads * tokens * 4
        if spec.rotary_attention:
            # The turned copies of q and k are kept beside the projections, whose storage v holds.
            kept += 2 * rows * inner * p.value + (out if spec.has_output_projection else 0)
        return Stage("attention", kept, projections, 2 * projections + 2 * out)
    if operator == "translution":
        d_in, d_out = spec.dim, inner
        sources = (3 - len(spec.roles)) * rows * inner * p.value
        extra = 0
    else:
        d_in, d_out = heads * spec.c1, heads * spec.c2
        lows = len(spec.roles) * d_in + (d_out if len(set("qk") & set(spec.roles)) == 1 else 0)
        sources = (3 * inner + lows) * rows * p.value
        extra = rows * d_out * p.value if "v" in spec.roles else 0
    kept = sources + extra + weights * p.value + (out if spec.has_output_projection else 0)
    if implementation == "gather":
        gathered = _gathered_bytes(spec, batch, p, d_in, d_out)
        one_role = batch * tokens**2 * d_in * d_out * p.value
        return Stage(operator, kept + gathered, one_role, 2 * one_role)
    workspace = workspace_bytes(spec.geometry, batch, d_in, d_out, p.value)
    forward = weights * p.accumulator + workspace + rows * d_out * p.accumulator
    grads = rows * (2 * d_in + d_out) * p.accumulator
    backward = weights * p.accumulator + workspace + grads + out
    return Stage(operator, kept, forward, backward)


def _embedding(spec: ModelSpec, batch: int, p: Precision) -> Stage:
    if isinstance(spec, VitSpec):
        patches = batch * spec.geometry.patches
        kept = _norm(patches, spec.patch_dim, p) + patches * spec.patch_dim * p.value + _norm(patches, spec.dim, p)
        return Stage("embedding", kept, kept, 2 * patches * (spec.patch_dim + spec.dim) * p.value)
    tokens = batch * spec.tokens
    return Stage("embedding", tokens * _TARGET_BYTES, tokens * spec.dim * p.value, tokens * spec.dim * p.value)


def _head(spec: ModelSpec, batch: int, p: Precision) -> Stage:
    """Final norms, head and cross-entropy, whose log-probabilities are computed in fp32."""
    rows = batch * spec.tokens
    if isinstance(spec, VitSpec):
        outputs, classes = batch, spec.classes
        kept = _norm(rows, spec.dim, p)
        kept += (rows if spec.pool == "class" else batch) * spec.dim * p.value
    else:
        outputs, classes = rows, spec.vocabulary
        kept = 2 * _norm(rows, spec.dim, p) + rows * spec.dim * p.value
    probabilities = outputs * classes * 4
    kept += probabilities + outputs * _TARGET_BYTES + 4
    logits = outputs * classes * p.value + (probabilities if p.value != 4 else 0)
    return Stage("head and loss", kept, logits, logits + probabilities + outputs * classes * p.value)


def stages(
    spec: ModelSpec,
    batch: int,
    precision: Precision,
    implementation: Implementation = "grouped",
) -> tuple[Stage, ...]:
    """The network's parts in forward order, equal neighbouring blocks folded into ``copies``.

    Args:
        spec: the model.
        batch: samples of one micro-batch.
        precision: widths of what is kept.
        implementation: "grouped", or "gather" for the published way.
    """
    rows = batch * spec.tokens
    offloads = precision.host_apart
    hidden = rows * spec.ffn_dim * precision.value
    stream = rows * spec.dim * precision.value
    result = [_embedding(spec, batch, precision)]
    for operator in spec.layer_operators:
        own = _operator(spec, operator, batch, precision, implementation)
        kept = 2 * _norm(rows, spec.dim, precision) + 2 * stream + 2 * hidden + own.kept_bytes
        forward = max(own.forward_bytes, hidden) + 2 * stream
        backward = max(own.backward_bytes, 2 * hidden) + 3 * stream
        if spec.checkpointing != "none":
            # The block is computed again from its input, which is all that was kept.
            forward, backward = forward + kept, backward + kept
            kept = 0 if spec.checkpointing == "offload" and offloads else stream
        if result[-1].name == own.name:
            last = result.pop()
            result.append(Stage(own.name, kept, forward, backward, last.copies + 1))
        else:
            result.append(Stage(own.name, kept, forward, backward))
    result.append(_head(spec, batch, precision))
    return tuple(result)


def sample_bytes(spec: ModelSpec) -> int:
    """Bytes of one sample's input and target: an fp32 image and its class, or token numbers."""
    if isinstance(spec, VitSpec):
        return spec.channels * spec.image[0] * spec.image[1] * 4 + _TARGET_BYTES
    return 2 * spec.tokens * _TARGET_BYTES


def kept_bytes(spec: ModelSpec, batch: int, precision: Precision, implementation: Implementation = "grouped") -> int:
    """Bytes that one forward pass keeps for backward, parameters left out."""
    return sum(stage.kept_bytes * stage.copies for stage in stages(spec, batch, precision, implementation))


def peak_bytes(spec: ModelSpec, batch: int, precision: Precision, implementation: Implementation = "grouped") -> int:
    """Highest sum of kept and momentary activations and their gradients in one forward and backward."""
    peak = kept = 0
    for stage in stages(spec, batch, precision, implementation):
        kept += stage.kept_bytes * stage.copies
        peak = max(peak, kept + stage.forward_bytes, kept + stage.backward_bytes)
    return peak
