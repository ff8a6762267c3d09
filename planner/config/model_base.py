"""What the specs of all model families share: sizes, the operator of every layer, and options.

Sources: arXiv 2510.10060, sections 3 to 5, and the published ViT and GPT code where the paper is silent.
"""

from __future__ import annotations

import re
from abc import abstractmethod
from typing import Annotated, Any, Literal, TypeAlias, TypeGuard

from pydantic import BeforeValidator, Field, model_validator

from ..common.errors import InputError
from ..common.schema import Schema
from ..common.types import Line
from .geometry import RelationGeometry, Window

Operator: TypeAlias = Literal["attention", "translution", "alpha", "bias", "shaw", "absolute"]
OPERATORS: tuple[Operator, ...] = ("translution", "alpha", "attention", "bias", "shaw", "absolute")
"""Full and low-rank Translution; self-attention plain, with a scalar (bias) or vectors (shaw) per
relation; and a matrix per position (absolute)."""

OPERATOR_LABELS: dict[str, str] = {
    "translution": "full Translution",
    "alpha": "α-Translution",
    "attention": "attention",
    "bias": "attention, scalars",
    "shaw": "attention, vectors",
    "absolute": "absolute matrices",
}
"""Operators in words, as every table and page names them."""

DEFAULT_WORKSPACE_BYTES = 256 * 2**20
"""Default limit of the scratch memory of one operator call, in bytes."""

FUSED_WIDTH_MULTIPLE, FUSED_HEAD_DIM = 16, 256
"""What divides the widths of matrices for which layers take the fused kernels by themselves, and the widest head that
the kernels take."""


def fits_fused_kernels(d_in: int, d_out: int, heads: int) -> bool:
    """Return whether layers take the fused kernels for matrices (d_in, d_out), where a GPU has them.

    Args:
        d_in: input width.
        d_out: output width, all heads together.
        heads: number of attention heads.
    """
    divided = d_in % FUSED_WIDTH_MULTIPLE == 0 == d_out % FUSED_WIDTH_MULTIPLE
    return divided and d_out // heads <= FUSED_HEAD_DIM


LOSS_CHUNK_ELEMENTS = 2**24
"""Logits of one chunk of a loss that is computed in chunks of tokens: 64 MiB in fp32."""

_LARGEST = 2**20

Size: TypeAlias = Annotated[int, Field(ge=1, le=_LARGEST, strict=True)]
"""A size of a model. The upper bound keeps a typing error from being counted for hours."""


def canonical_roles(value: object) -> str:
    """Return the roles in the order q, k, v.

    Raises:
        ValueError: if the value is not a non-empty subset of "qkv" without repeats.
    """
    if not isinstance(value, str) or not value or set(value) - set("qkv") or len(set(value)) < len(value):
        raise ValueError(f"{value!r} is not allowed: must be one or more of q, k and v, each once")
    return "".join(role for role in "qkv" if role in value)


def canonical_window(value: object) -> Window:
    """Return a window, with one distance per axis as a tuple.

    Raises:
        ValueError: if the value is neither null nor a distance, nor a list of these.
    """

    def is_reach(reach: object) -> TypeGuard[int | None]:
        return reach is None or (type(reach) is int and 0 <= reach <= _LARGEST)

    if isinstance(value, list | tuple) and value and all(map(is_reach, value)):
        return tuple(value)
    if is_reach(value):
        return value
    raise ValueError(f"{value!r} is not allowed: must be from 0 to {_LARGEST}, or null, or a list of one per axis")


def parse_layers(value: object, depth: int) -> tuple[int, ...]:
    """Return the numbers of the layers that use the relative operator.

    Args:
        value: "all", "first:K", "every:K" (layers 0, K, 2K, …) or a list of layer numbers.
        depth: number of layers.

    Raises:
        ValueError: for anything else.
    """
    allowed = f"must be all, first:K or every:K with K from 1 to {depth}, or a list of layers below {depth}"
    if value == "all":
        return tuple(range(depth))
    if isinstance(value, str):
        match = re.fullmatch(r"(first|every):(\d+)", value)
        if match and 1 <= int(match[2]) <= depth:
            count = int(match[2])
            return tuple(range(count)) if match[1] == "first" else tuple(range(0, depth, count))
    elif isinstance(value, list | tuple):
        layers = tuple(value)
        if (
            layers
            and all(isinstance(n, int) and not isinstance(n, bool) and 0 <= n < depth for n in layers)
            and len(set(layers)) == len(layers)
        ):
            return tuple(sorted(layers))
    raise ValueError(f"relative_layers: {value!r} is not allowed: {allowed}")


def default_ffn_dim(dim: int, ffn: str) -> int:
    """Return the hidden width of the feed-forward network of a model of width ``dim``.

    It is ``4·dim``; with swiglu, which has a third matrix, ``8·dim/3`` rounded up to a multiple of 8.
    """
    return -(-dim // 3) * 8 if ffn == "swiglu" else 4 * dim


class ModelSpecBase(Schema):
    """Fields that all families share.

    Frozen; unknown keys are rejected. ``head_dim`` defaults to ``dim / heads`` and ``ffn_dim`` to `default_ffn_dim`.
    """

    name: Line = "custom"
    """Name of the model in reports."""
    dim: Size
    """Model width, C."""
    depth: Size
    """Number of blocks."""
    heads: Size
    """Attention heads, h."""
    head_dim: Size
    """Width per head, D; the inner width C' is h·D."""
    ffn_dim: Size
    """Hidden width of the feed-forward network."""
    kv_heads: Size | None = None
    """Heads of keys and values in the attention layers (grouped-query attention); null is ``heads``."""
    ffn: Literal["gelu", "swiglu"] = "gelu"
    """Feed-forward network: two layers with GELU between them, or three as in LLaMA: down(silu(gate(x))·up(x))."""
    norm: Literal["layer", "rms"] = "layer"
    """LayerNorm, or RMSNorm, which has no mean and no bias."""
    bias: bool = True
    """Whether linear layers and layer norms have biases; projections to queries, keys and values have none."""
    operator: Operator = "translution"
    """The operator of the relative layers, or of all layers for attention."""
    roles: Annotated[str, BeforeValidator(canonical_roles)] = "qkv"
    """Roles (query, key, value) that have a matrix per relation."""
    c1: Size = 16
    """First low width per head of α-Translution."""
    c2: Size = 16
    """Second low width per head of α-Translution."""
    relative_layers: str | tuple[int, ...] = "all"
    """Layers that use the relative operator."""
    other_layers: Literal["attention", "alpha"] = "attention"
    """Operator of the other layers: rotary self-attention or, with full Translution, α-Translution."""
    window: Annotated[Window, BeforeValidator(canonical_window)] = None
    """Largest distance of a pair of tokens in the relative layers, along every axis or one per axis; null keeps all."""
    checkpointing: Literal["none", "block", "offload"] = "none"
    """Activation checkpointing: save only each block's input and recompute; offload saves it on the host."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout probability of attention weights, hidden values and each sub-layer's output in training."""
    rotary: bool = False
    """Apply rotary embedding to the plain queries and keys of attention or α-Translution."""
    rotary_pairs: Literal["neighbours", "halves"] = "neighbours"
    """The coordinates of a head that rotary embedding turns together: 2k and 2k + 1, or k and k + D/2."""
    other_rotary: bool = True
    """Whether the attention of the other layers is rotary."""
    positions: Literal["auto", "learned", "none"] = "auto"
    """Whether a learned position embedding is added to the tokens; auto adds one to attention without rotary."""
    token_init_std: Annotated[float, Field(gt=0)] = 0.02
    """Standard deviation of the initial class token and position embedding; the published networks have 1."""

    @model_validator(mode="before")
    @classmethod
    def _fill_widths(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        data = dict(data)
        dim, heads = data.get("dim"), data.get("heads")
        if isinstance(dim, int) and isinstance(heads, int) and dim > 0 and heads > 0:
            if data.get("head_dim") is None:
                if dim % heads:
                    raise ValueError(f"heads: {heads} is not allowed: must divide dim {dim} when head_dim is not given")
                data["head_dim"] = dim // heads
            if data.get("ffn_dim") is None:
                data["ffn_dim"] = default_ffn_dim(dim, data.get("ffn", "gelu"))
        return data

    @model_validator(mode="after")
    def _check_layers(self) -> ModelSpecBase:
        relative = parse_layers(self.relative_layers, self.depth)
        hybrid = self.operator != "attention" and len(relative) < self.depth
        if self.window is not None and self.operator in ("attention", "absolute"):
            raise ValueError(f"window: {self.window} is not allowed: must be null for operator {self.operator}")
        if self.rotary and self.operator not in ("attention", "alpha"):
            raise ValueError(f"rotary: True is not allowed: must be false for operator {self.operator}")
        if self.other_layers == "alpha" and self.operator != "translution":
            raise ValueError(f"other_layers: 'alpha' is not allowed: must be attention for operator {self.operator}")
        others = hybrid and self.other_layers == "attention"
        if not self.other_rotary and not others:
            raise ValueError("other_rotary: False is not allowed: must be true without other layers of attention")
        turning = self.rotary or (others and self.other_rotary)
        if self.rotary_pairs == "halves" and not turning:
            raise ValueError("rotary_pairs: 'halves' is not allowed: must be neighbours without rotary layers")
        self._check_extents()
        try:
            geometry = self.geometry
        except InputError as error:
            raise ValueError(str(error)) from None
        if turning and (problem := geometry.rotary_problem(self.head_dim)):
            raise ValueError(f"head_dim: {self.head_dim} is not allowed: {problem} for rotary layers")
        return self

    @model_validator(mode="after")
    def _check_kv_heads(self) -> ModelSpecBase:
        if self.kv_heads is None:
            return self
        if self.heads % self.kv_heads:
            raise ValueError(f"kv_heads: {self.kv_heads} is not allowed: must divide heads {self.heads}")
        if "attention" not in self.layer_operators:
            raise ValueError(f"kv_heads: {self.kv_heads} is not allowed: must be null without attention layers")
        return self

    def _check_extents(self) -> None:
        """Check what the geometry is made from; a ValueError names the field."""

    @property
    @abstractmethod
    def geometry(self) -> RelationGeometry:
        """Geometry of the model's tokens."""

    @property
    def tokens(self) -> int:
        """Tokens per sample, N."""
        return self.geometry.tokens

    @property
    def inner_dim(self) -> int:
        """Width over all heads, C'."""
        return self.heads * self.head_dim

    @property
    def kv_dim(self) -> int:
        """Width of the keys, and of the values, over all heads of an attention layer."""
        return (self.kv_heads or self.heads) * self.head_dim

    @property
    def norm_tensors(self) -> int:
        """Parameter tensors of a norm: its weight, and the bias of a LayerNorm."""
        return 2 if self.bias and self.norm == "layer" else 1

    @property
    def low_dims(self) -> tuple[int, int]:
        """The two low widths of α-Translution, over all heads."""
        return self.heads * self.c1, self.heads * self.c2

    @property
    def layer_operators(self) -> tuple[Operator, ...]:
        """The operator of each layer."""
        relative = set(parse_layers(self.relative_layers, self.depth))
        operators: list[Operator] = [self.operator if n in relative else self.other_layers for n in range(self.depth)]
        return tuple(operators)

    @property
    def learned_positions(self) -> bool:
        """True if a learned position embedding is added."""
        if self.positions == "auto":
            return self.operator == "attention" and not self.rotary
        return self.positions == "learned"

    @property
    def rotary_attention(self) -> bool:
        """True if the attention layers are rotary: in hybrids by ``other_rotary``, else by ``rotary``."""
        return self.rotary if self.operator == "attention" else self.other_rotary

    @property
    def attention_causal(self) -> bool:
        """True if a token of an attention layer sees only itself and earlier ones."""
        return self.geometry.causal

    @property
    def attention_mask(self) -> bool:
        """True if attention layers need a mask: torch's fused attention knows only all pairs and those with j ≤ i."""
        return self.attention_causal and not self.geometry.triangular

    @property
    def has_output_projection(self) -> bool:
        """True if an operator ends with an output projection; one head as wide as the model has none."""
        return not (self.heads == 1 and self.head_dim == self.dim)
