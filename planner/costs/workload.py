"""Work of a training step: FLOPs, every matrix product by shape, elementwise work, and what ZeRO moves.

The FLOPs of the products add up to `count_flops`; a test compares them. `volumes` counts the tensors and elements that
ZeRO gathers, reduces and moves between tiers.

Sources: models/; arXiv 2510.10060, section 3: a relative role costs 2·ΣP(r)·C·C' FLOPs, however its pairs are grouped.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from ..common.schema import Schema
from ..config.geometry import RelationGeometry
from ..config.model import GptSpec, ModelSpec, PatchSpec
from ..config.model_base import Operator
from ..deepspeed.config import NVME_BLOCK_BYTES
from .parameters import TABLES, owned_parameter_groups


class Product(NamedTuple):
    """Matrix products (rows, inner) by (inner, cols) of the same shape, of one sample."""

    rows: int
    inner: int
    cols: int
    copies: int
    """Number of layers, tables and roles that compute it."""
    forward: int
    """Products of this size in forward, for each copy."""
    backward: int
    """Products of this size in backward, for each copy."""
    grouped: bool = False
    """Whether the product multiplies the rows of one relation by its matrix."""
    joined: bool = True
    """Whether the samples of a micro-batch are rows of one product; otherwise each sample is a product."""
    fused: bool = False
    """Whether torch's fused attention computes it; its backward computes the logits once more."""
    computed: float = 1.0
    """Fraction of the result that is computed: a causal fused attention leaves out the blocks above the diagonal."""

    @property
    def flops(self) -> int:
        """FLOPs of one product."""
        return 2 * self.rows * self.inner * self.cols


_CALLS = 40
"""torch operations of a layer in forward, and those outside of the layers."""
FUSED_BLOCK = 128
"""Tokens of a block that fused attention computes or leaves out as a whole. Source: FlashAttention-2, arXiv 2307.08691,
section 3.1."""


@dataclass(frozen=True, slots=True)
class Work:
    """Work of one sample."""

    products: tuple[Product, ...]
    forward_elements: int
    """Elements that elementwise operations read or write in forward, without those of `relation_rows`."""
    backward_elements: int
    """The same in backward."""
    relation_rows: tuple[int, int]
    """Elements of the rows that are gathered for relations, their products and sums, in forward and in backward; fused
    kernels keep them on the chip."""
    operations: int
    """Number of torch operations in a forward pass, independent of the micro-batch."""
    relation_visits: int
    """Number of (relation, table) pairs that a forward pass computes one by one."""
    recompute: float
    """Fraction of forward that checkpointing recomputes: that of the blocks."""


@lru_cache(maxsize=256)
def pair_counts(geometry: RelationGeometry, role: str) -> tuple[tuple[int, int], ...]:
    """Return pairs (rows that are multiplied by one relation's matrix, number of relations with that many rows).

    Args:
        geometry: arrangement of the tokens.
        role: "q", "k" or "v".
    """
    counts: Counter[int] = Counter({1: 1})
    for extents in geometry.extents():
        along, so_far = Counter(extents), counts
        counts = Counter()
        for rows, relations in so_far.items():
            for extent, offsets in along.items():
                counts[rows * extent] += relations * offsets
    if geometry.class_token:
        # The class token with itself; then its pairs with patches, in which it is one row, and they are the other side.
        counts[1] += 1
        counts[1] += not geometry.causal or role == "q"
        counts[geometry.patches] += not geometry.causal or role != "q"
    return tuple(sorted((rows, relations) for rows, relations in counts.items() if relations))


def is_fused(spec: ModelSpec, operator: Operator) -> bool:
    """Return whether torch's fused attention computes an operator: it never writes the weights of the pairs.

    Source: models/layers/attention.py; with dropout, weights are computed in blocks by this project's own operator.
    """
    return operator == "attention" and not spec.dropout


def _tables(spec: ModelSpec, d_in: int, d_out: int) -> Iterator[Product]:
    for role in spec.roles:
        for rows, relations in pair_counts(spec.geometry, role):
            yield Product(rows, d_in, d_out, relations, 1, 3, grouped=True)


def _joint_dim(spec: ModelSpec, operator: Operator) -> int:
    """Return the width of the joint projection to queries, keys and values."""
    return spec.inner_dim + 2 * (spec.kv_dim if operator == "attention" else spec.inner_dim)


def ffn_products(spec: ModelSpec) -> int:
    """Return the products of a feed-forward network."""
    return 3 if spec.ffn == "swiglu" else 2


def _operator(spec: ModelSpec, operator: Operator) -> Iterator[Product]:
    tokens, dim, inner, roles = spec.tokens, spec.dim, spec.inner_dim, spec.roles
    plain_logits, plain_values = True, True
    if operator in ("attention", "bias", "shaw"):
        yield Product(tokens, dim, _joint_dim(spec, operator), 1, 1, 2)
    elif operator == "absolute":
        yield Product(1, dim, inner, 3 * tokens, 1, 2)
    elif operator == "translution":
        if len(roles) < 3:
            yield Product(tokens, dim, inner, 3 - len(roles), 1, 2)
        yield from _tables(spec, dim, inner)
        plain_logits, plain_values = not {"q", "k"} & set(roles), "v" not in roles
    else:
        low1, low2 = spec.low_dims
        yield Product(tokens, dim, 3 * inner + len(roles) * low1, 1, 1, 2)
        if len({"q", "k"} & set(roles)) == 1:
            yield Product(tokens, dim, low2, 1, 1, 2)
        if "v" in roles:
            yield Product(tokens, low2, inner, 1, 1, 2)
        yield from _tables(spec, low1, low2)
    products = (plain_logits + plain_values) * (2 if operator == "shaw" else 1)
    if is_fused(spec, operator):
        blocks = -(-tokens // FUSED_BLOCK)
        computed = (blocks + 1) / (2 * blocks) if spec.attention_causal and not spec.attention_mask else 1.0
        yield Product(tokens, spec.head_dim, tokens, spec.heads, 2, 4, joined=False, fused=True, computed=computed)
    elif products:
        yield Product(tokens, spec.head_dim, tokens, spec.heads * products, 1, 2, joined=False)
    if spec.has_output_projection:
        yield Product(tokens, inner, dim, 1, 1, 2)


def _relation_rows(spec: ModelSpec, operator: Operator) -> tuple[int, int, int]:
    """Return the elements of a layer's gathered rows in forward and in backward, and the relation visits."""
    if operator not in ("translution", "alpha"):
        return 0, 0, 0
    d_in, d_out = (spec.dim, spec.inner_dim) if operator == "translution" else spec.low_dims
    rows = sum(map(spec.geometry.table_rows, spec.roles))
    # Rows are gathered, multiplied and summed; backward repeats this and adds to the inputs' gradients.
    return rows * (2 * d_in + 3 * d_out), rows * (5 * d_in + 7 * d_out), len(spec.roles) * spec.geometry.relations


def _layer_elements(spec: ModelSpec, operator: Operator) -> tuple[int, int]:
    """Return the other elements of forward and of backward of one layer."""
    tokens, dim, inner = spec.tokens, spec.dim, spec.inner_dim
    # Fused attention reads and writes queries, keys, values and the result only.
    pairs = 0 if is_fused(spec, operator) else spec.heads * tokens * tokens
    # Two norms, two residual sums, an activation function; then the softmax of all pairs.
    hidden_forward, hidden_backward = (6, 11) if spec.ffn == "swiglu" else (3, 5)
    forward = tokens * (10 * dim + hidden_forward * spec.ffn_dim + 6 * inner) + 11 * pairs
    backward = tokens * (18 * dim + hidden_backward * spec.ffn_dim + 9 * inner) + 13 * pairs
    if spec.dropout:
        forward, backward = forward + 4 * pairs, backward + 3 * pairs
    return forward, backward


@lru_cache(maxsize=256)
def count_work(spec: ModelSpec) -> Work:
    """Return the products and the elementwise work of one sample."""
    tokens, dim = spec.tokens, spec.dim
    merged: Counter[Product] = Counter()
    forward = backward = visits = 0
    gathered = [0, 0]
    calls = _CALLS
    for operator, layers in Counter(spec.layer_operators).items():
        for product in _operator(spec, operator):
            merged[product._replace(copies=1)] += product.copies * layers
        more_forward, more_backward = _layer_elements(spec, operator)
        forward, backward = forward + layers * more_forward, backward + layers * more_backward
        *rows, more_visits = _relation_rows(spec, operator)
        gathered = [so_far + layers * more for so_far, more in zip(gathered, rows, strict=True)]
        calls, visits = calls + layers * _CALLS, visits + layers * more_visits
    products = [product._replace(copies=count) for product, count in merged.items()]
    products.append(Product(tokens, dim, spec.ffn_dim, ffn_products(spec) * spec.depth, 1, 2))
    blocks = sum(product.flops * product.copies for product in products)
    if isinstance(spec, PatchSpec):
        products.append(Product(spec.geometry.patches, spec.patch_dim, dim, 1, 1, 2))
        products.append(Product(1, dim, spec.classes, 1, 1, 2))
    else:
        assert isinstance(spec, GptSpec)
        products.append(Product(tokens, dim, spec.vocabulary, 1, 1, 2))
        # The loss: logits are cast to fp32, exponentiated and summed.
        forward, backward = forward + 5 * tokens * spec.vocabulary, backward + 3 * tokens * spec.vocabulary
    total = sum(product.flops * product.copies for product in products)
    return Work(tuple(products), forward, backward, (gathered[0], gathered[1]), calls, visits, blocks / total)


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
    rows = sum(map(spec.geometry.table_rows, spec.roles))
    relative = len(spec.roles)
    plain = 2 * tokens * inner * dim if spec.has_output_projection else 0
    grouped = 0
    logits_relative = bool({"q", "k"} & set(spec.roles))
    if operator in ("attention", "bias", "shaw", "absolute"):
        # A matrix per position costs as much as one for all; shaw multiplies vectors with every pair twice.
        plain += 2 * tokens * dim * _joint_dim(spec, operator) + (4 if operator == "shaw" else 2) * pairs_product
    elif operator == "translution":
        plain += 2 * tokens * dim * inner * (3 - relative)
        plain += pairs_product * ((not logits_relative) + ("v" not in spec.roles))
        grouped = 2 * rows * dim * inner
    else:
        low1, low2 = spec.heads * spec.c1, spec.heads * spec.c2
        plain += 2 * tokens * dim * (3 * inner + relative * low1) + 2 * pairs_product
        if len({"q", "k"} & set(spec.roles)) == 1:
            plain += 2 * tokens * dim * low2
        if "v" in spec.roles:
            plain += 2 * tokens * low2 * inner
        grouped = 2 * rows * low1 * low2
    return plain, grouped


def count_flops(spec: ModelSpec) -> FlopCount:
    """Count the FLOPs of the matrix products of one sample.

    The backward of a plain product is two products of the same size; that of a grouped product is three, because
    queries, keys and values are recomputed. Softmax, norms and activation functions are not counted.
    """
    tokens, dim = spec.tokens, spec.dim
    plain = spec.depth * 2 * ffn_products(spec) * tokens * dim * spec.ffn_dim
    grouped = 0
    if isinstance(spec, PatchSpec):
        plain += 2 * spec.geometry.patches * spec.patch_dim * dim + 2 * dim * spec.classes
    else:
        assert isinstance(spec, GptSpec)
        plain += 2 * tokens * dim * spec.vocabulary
    for operator in spec.layer_operators:
        more_plain, more_grouped = _operator_forward(spec, operator)
        plain, grouped = plain + more_plain, grouped + more_grouped
    return FlopCount(forward=plain + grouped, training_step=3 * plain + 4 * grouped)


@dataclass(frozen=True, slots=True)
class Volumes:
    """Tensors and elements of a model, by how ZeRO moves them."""

    elements: int
    """Elements of all tensors."""
    partition_numel: int
    """Elements of a rank's partitions, every tensor padded to a multiple of the number of partitions."""
    tensors: int
    """Number of tensors."""
    gathered: int
    """Elements that are gathered again for every use."""
    gathers: int
    """Number of gathers that gather them once."""
    persistent: int
    """Elements that stay gathered."""
    largest: int
    """Elements of the largest tensor."""
    tiles: int
    """Tile modules called in one forward pass."""
    small: tuple[int, int]
    """Elements of a rank's partitions that are too small for a file on NVMe, at 2 and at 4 bytes per element."""


@lru_cache(maxsize=512)
def volumes(
    spec: ModelSpec, tile_relations: int | None, partitions: int, persistence: int, relation_ranks: int = 1
) -> Volumes:
    """Count the tensors and elements of a model, or of the rank with the most relations of a relation group.

    Args:
        spec: the model.
        tile_relations: relations per tile; None for one tile per table.
        partitions: number of ranks that ZeRO partitions a tensor over.
        persistence: maximum elements of a tensor that stays gathered.
        relation_ranks: ranks that share out the relations, G; 1 for all relations.
    """
    both = len({"q", "k"} & set(spec.roles)) == 2
    elements = partition_numel = tensors = gathered = gathers = persistent = largest = tiles = half = full = 0
    for group in owned_parameter_groups(spec, tile_relations, relation_ranks):
        elements, tensors = elements + group.total, tensors + group.copies
        part = -(-group.numel // partitions)
        partition_numel += part * group.copies
        half += part * group.copies * (part * 2 < NVME_BLOCK_BYTES)
        full += part * group.copies * (part * 4 < NVME_BLOCK_BYTES)
        largest = max(largest, group.numel)
        calls = group.copies
        if group.component == TABLES:
            # A tile of logits gathers the matrices of queries and keys in one call.
            calls = calls * (len(spec.roles) - both) // len(spec.roles)
            tiles += calls
        if group.numel <= persistence:
            persistent += group.total
        else:
            gathered, gathers = gathered + group.total, gathers + calls
    if isinstance(spec, GptSpec) and spec.tied_embeddings and (shared := spec.vocabulary * spec.dim) > persistence:
        # The head gathers the embedding's matrix again.
        gathered, gathers = gathered + shared, gathers + 1
    return Volumes(elements, partition_numel, tensors, gathered, gathers, persistent, largest, tiles, (half, full))
