"""State and buffers of one call of the relation operator, and strided views of one relation in them.

Legend of shape suffixes: b batch, n tokens, c input width, e inner width (heads · width per head),
h heads, d width per head, … the extents of a relation's box of pairs along the axes of the grid.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from translution.planner.config import OwnedGeometry, RelationGeometry, RelationPairs, TokenBlock

from .grouped_mm import Products


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of sums over relations: fp32 for bf16 and fp16, otherwise the dtype itself."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def token_rows(x_bnc: Tensor, block: TokenBlock, samples: slice, rows: slice) -> Tensor:
    """Return the tokens of a block in (b, n, c) as a view (samples, rows, …, c); nothing is copied."""
    stride_b, stride_n, stride_c = x_bnc.stride()
    if block.size == 1:
        rows = slice(0, 1)
    offset = x_bnc.storage_offset() + samples.start * stride_b
    offset += (block.start + rows.start * block.strides[0]) * stride_n
    return x_bnc.as_strided(
        (samples.stop - samples.start, rows.stop - rows.start, *block.shape[1:], x_bnc.shape[2]),
        (stride_b, *(stride * stride_n for stride in block.strides), stride_c),
        offset,
    )


def by_token(rows: Tensor, block: TokenBlock) -> Tensor:
    """Return rows (b, …, c) of a box of pairs as rows of a block's tokens: summed if all pairs share one token."""
    axes = tuple(range(1, rows.ndim - 1))
    return rows.sum(axes, keepdim=True) if block.size == 1 and rows.shape[1:-1].numel() > 1 else rows


def pair_values(a_bhnn: Tensor, pairs: RelationPairs, samples: slice, rows: slice) -> Tensor:
    """Return the values of a relation's pairs in (b, h, n, n) as a view (samples, rows, …, h)."""
    stride_b, stride_h, stride_i, stride_j = a_bhnn.stride()
    query, key = pairs.query, pairs.key
    strides = [i * stride_i + j * stride_j for i, j in zip(query.strides, key.strides, strict=True)]
    offset = a_bhnn.storage_offset() + samples.start * stride_b + rows.start * strides[0]
    offset += query.start * stride_i + key.start * stride_j
    return a_bhnn.as_strided(
        (samples.stop - samples.start, rows.stop - rows.start, *pairs.shape[1:], a_bhnn.shape[1]),
        (stride_b, *strides, stride_h),
        offset,
    )


def _steps(geometry: RelationGeometry, axis: int, device: torch.device) -> Tensor:
    """Offset of every pair of patches along one axis, (patches, patches) int64."""
    tokens = torch.arange(geometry.patches, device=device)
    place = tokens // geometry.strides[axis] % geometry.axes[axis]
    return place[:, None] - place[None, :]


def relation_index(geometry: RelationGeometry, device: torch.device) -> Tensor:
    """Relation of every pair (query, key), (n, n) int64; −1 where the pair does not exist."""
    if isinstance(geometry, OwnedGeometry):
        numbers = torch.full((geometry.whole.relations + 1,), -1, dtype=torch.int64)  # The last: no pair, index −1.
        numbers[list(geometry.owned)] = torch.arange(geometry.relations)
        return numbers.to(device)[relation_index(geometry.whole, device)]
    index = torch.zeros(geometry.patches, geometry.patches, dtype=torch.int64, device=device)
    for axis, (low, span) in enumerate(zip(geometry.lowest, geometry.spans, strict=True)):
        index.mul_(span).add_(_steps(geometry, axis, device).sub_(low))
    if geometry.class_token:
        index = torch.nn.functional.pad(index, (1, 0, 1, 0), value=geometry.offsets + 1)
        index[1:, 0] = geometry.offsets + 2
        index[0, 0] = geometry.offsets
    return index if geometry.complete else index.masked_fill_(missing_pairs(geometry, device), -1)


def missing_pairs(geometry: RelationGeometry, device: torch.device) -> Tensor:
    """Return the mask of the pairs that do not exist, (n, n) bool."""
    missing = torch.zeros(geometry.patches, geometry.patches, dtype=torch.bool, device=device)
    for axis, (low, high) in enumerate(zip(geometry.lowest, geometry.reach, strict=True)):
        steps = _steps(geometry, axis, device)
        missing |= steps < low
        missing |= steps > high
        del steps  # Before the next axis needs as much.
    if not geometry.class_token:
        return missing
    missing = torch.nn.functional.pad(missing, (1, 0, 1, 0))
    missing[1:, 0] = geometry.causal
    return missing


def dropout_noise(like: Tensor, dropout: float, seed: int, first: int = 0) -> Tensor:
    """Return dropout factors: zero with probability ``dropout``, otherwise 1 / (1 − dropout).

    The same seed gives the same factors, so backward draws them again instead of saving them. Every sample has a seed
    of its own, so that a rank draws the factors of its samples alone, and they are those of the whole batch.

    Args:
        like: tensor (b, …) whose shape, dtype and device the factors have.
        dropout: probability of zero.
        seed: seed of the batch.
        first: number of the first sample in the batch of which these samples are a part.
    """
    generator, noise = torch.Generator(like.device), torch.empty_like(like)
    for number, sample in enumerate(noise, start=first):
        generator.manual_seed((seed + number) % 2**63)
        sample.bernoulli_(1 - dropout, generator=generator)
    return noise.div_(1 - dropout)


class Workspace:
    """Bounded scratch memory: four matrices of up to ``rows`` rows, reused by every relation.

    Args:
        like: tensor whose dtype and device the matrices have.
        pairs_per_call: maximum number of pairs of one relation in the full batch.
        layer: maximum number of pairs with one index of the first axis, the smallest piece of work.
        widths: widths of the matrices.
        limit_bytes: size limit, exceeded only if the smallest piece is larger.
    """

    def __init__(
        self, like: Tensor, pairs_per_call: int, layer: int, widths: tuple[int, ...], limit_bytes: int
    ) -> None:
        row_bytes = sum(widths) * like.element_size()
        self.rows = max(layer, min(pairs_per_call, limit_bytes // row_bytes))
        self._buffer = like.new_empty(self.rows * sum(widths))
        starts = [sum(widths[:n]) * self.rows for n in range(len(widths))]
        self._matrices = tuple(
            self._buffer[start : start + self.rows * width].view(self.rows, width)
            for start, width in zip(starts, widths, strict=True)
        )

    def matrix(self, index: int, rows: int) -> Tensor:
        """Return the first rows of a matrix, to be overwritten."""
        return self._matrices[index][:rows]

    def copy_rows(self, index: int, view: Tensor) -> Tensor:
        """Return token rows (b, …, c) as a matrix (rows, c), copied only if they are not contiguous."""
        rows = view.shape[:-1].numel()
        if view.is_contiguous():
            return view.view(rows, view.shape[-1])
        matrix = self.matrix(index, rows)
        matrix.view(view.shape).copy_(view)
        return matrix

    def copied_rows(self, index: int, view: Tensor) -> Tensor:
        """Return the result of the last `copy_rows` of this view again, if nothing has overwritten it."""
        rows = view.shape[:-1].numel()
        return view.view(rows, view.shape[-1]) if view.is_contiguous() else self.matrix(index, rows)


class RelationContext:
    """State that the autograd functions of one call share outside autograd.

    In forward it holds the logits, then the attention weights before and after dropout, then the
    output; in backward, their gradients. Autograd runs the functions in order, so each one finds
    here the results of the one before it. Between forward and backward the context holds no
    buffers: the last function of the chain saves the tensors of backward, once, where
    checkpointing and saved-tensor hooks see them.

    Args:
        geometry: arrangement of the tokens.
        heads: number of attention heads.
        scale: factor applied to the summed logits.
        workspace_bytes: limit of the scratch memory.
    """

    def __init__(self, geometry: RelationGeometry, heads: int, scale: float, workspace_bytes: int) -> None:
        self.geometry = geometry
        self.heads = heads
        self.scale = scale
        self.workspace_bytes = workspace_bytes
        self.widths = (0, 0)
        """Input and output width of the relation matrices."""
        self.dropout = 0.0
        self.seed, self.first_sample = 0, 0
        """Seed of this call's dropout, and the number of its first sample, as in `dropout_noise`."""
        self.adds_logits = False
        """True if tiles add to the logits of plain queries and keys; false if they write them."""
        self.key_padding: Tensor | None = None
        """(b, n), true where a token is padding."""
        self.source: dict[str, Tensor] = {}
        """Inputs of the operator by name, (b, n, width) each, detached."""
        self.relative: frozenset[str] = frozenset()
        """Names of the inputs that have a relation table."""
        self.wanted: frozenset[str] = frozenset()
        """Names of the inputs that require a gradient."""
        self.logits: Tensor | None = None
        """Logits, (b, h, n, n); they exist from the first function of the chain to softmax."""
        self.attention: Tensor | None = None
        """Attention weights before dropout, (b, h, n, n)."""
        self.weights: Tensor | None = None
        """Attention weights after dropout, (b, h, n, n); `attention` itself without dropout."""
        self.out: Tensor | None = None
        """Output of the relative values, (b, n, e)."""
        self.implementation = "grouped"
        """How tiles are computed: "fused", "batched" or "grouped"."""
        self.deterministic = False
        """True if the fused kernels must give the same result in every run."""
        self.products: Products | None = None
        """Implementation of their products; None chooses the fastest that proves correct."""
        self._workspace: Workspace | None = None
        self.grad_out: Tensor | None = None
        """Gradient of `out`, (b, n, e)."""
        self.grad_attention: Tensor | None = None
        """Gradient of the attention weights, (b, h, n, n); softmax turns it into that of the logits, in place."""
        self.grads: dict[str, Tensor] = {}
        """Gradients of the inputs by name, (b, n, width) each."""

    def allocate_workspace(self) -> None:
        """Allocate the scratch memory of a forward or backward pass if it is certain to be needed."""
        if self.relative and self.implementation == "grouped":
            self.workspace()

    def workspace(self) -> Workspace:
        """Return the scratch memory, allocated at first use."""
        if self._workspace is None:
            self._workspace = self._make_workspace(next(iter(self.source.values())))
        return self._workspace

    def _make_workspace(self, like: Tensor) -> Workspace:
        d_in, d_out = self.widths
        largest = like.shape[0] * self.geometry.patches
        widths = (d_in, d_in, d_out, d_out)
        # Chunks of many relations use the rest of the limit.
        limit = self.workspace_bytes if self.implementation == "grouped" else self.workspace_bytes // 4
        return Workspace(like, largest, self.geometry.layer_patches, widths, limit)

    def apply_dropout(self, x_bhnn: Tensor) -> Tensor:
        """Apply this call's dropout, the same one every time; return the tensor itself without dropout."""
        return x_bhnn * self.noise(x_bhnn) if self.dropout else x_bhnn

    def noise(self, like: Tensor) -> Tensor:
        """Return the factors of this call's dropout, the same ones every time."""
        return dropout_noise(like, self.dropout, self.seed, self.first_sample)

    def release(self) -> None:
        """Release every buffer."""
        self.source, self.grads = {}, {}
        self.logits = self.attention = self.weights = self.out = self._workspace = None
        self.grad_out = self.grad_attention = None

    def pieces(self, pairs: RelationPairs, batch: int) -> Iterator[tuple[slice, slice]]:
        """Split a relation's pairs into pieces (samples, rows) that fit the workspace."""
        limit = self.workspace().rows
        samples = limit // pairs.count
        if samples:
            for start in range(0, batch, samples):
                yield slice(start, min(start + samples, batch)), slice(0, pairs.rows)
            return
        rows = max(1, limit // pairs.cols)
        for sample in range(batch):
            for start in range(0, pairs.rows, rows):
                yield slice(sample, sample + 1), slice(start, min(start + rows, pairs.rows))
