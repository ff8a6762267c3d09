"""Buffers of one call of a grouped operator, and the strided views of one relation in them.

Legend of shape suffixes: b batch, n tokens, c input width, e inner width (heads·width per head),
h heads, d width per head, r and s the rows and columns of a relation's rectangle of pairs.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from translution.planner.config.geometry import RelationGeometry, RelationPairs, TokenBlock

DEFAULT_WORKSPACE_BYTES = 256 * 2**20


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which sums over relations are kept: fp32 for the half-width types."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def token_rows(x_bnc: Tensor, block: TokenBlock, samples: slice, rows: slice) -> Tensor:
    """The tokens of a block as a view of shape (samples, rows, cols, width); nothing is copied."""
    stride_b, stride_n, stride_c = x_bnc.stride()
    if block.size == 1:
        rows = slice(0, 1)
    offset = x_bnc.storage_offset() + samples.start * stride_b
    offset += (block.start + rows.start * block.row_stride) * stride_n
    return x_bnc.as_strided(
        (samples.stop - samples.start, rows.stop - rows.start, block.cols, x_bnc.shape[2]),
        (stride_b, block.row_stride * stride_n, block.col_stride * stride_n, stride_c),
        offset,
    )


def pair_values(a_bhnn: Tensor, pairs: RelationPairs, samples: slice, rows: slice) -> Tensor:
    """What an (b, h, n, n) tensor holds for the pairs, as a view of shape (samples, rows, cols, heads)."""
    stride_b, stride_h, stride_i, stride_j = a_bhnn.stride()
    query, key = pairs.query, pairs.key
    row = query.row_stride * stride_i + key.row_stride * stride_j
    col = query.col_stride * stride_i + key.col_stride * stride_j
    offset = a_bhnn.storage_offset() + samples.start * stride_b + rows.start * row
    offset += query.start * stride_i + key.start * stride_j
    return a_bhnn.as_strided(
        (samples.stop - samples.start, rows.stop - rows.start, pairs.cols, a_bhnn.shape[1]),
        (stride_b, row, col, stride_h),
        offset,
    )


def relation_index(geometry: RelationGeometry, device: torch.device) -> Tensor:
    """The relation of every pair (query, key) as an (n, n) tensor of int64; −1 where there is none."""
    tokens = torch.arange(geometry.patches, device=device)
    row, col = tokens // geometry.width, tokens % geometry.width
    rows, cols = geometry.reach
    down, right = row[:, None] - row[None, :], col[:, None] - col[None, :]
    index = down if geometry.causal else (down + rows) * (2 * cols + 1) + right + cols
    index = index.masked_fill((down.abs() > rows) | (right.abs() > cols) | (geometry.causal & (down < 0)), -1)
    if geometry.class_token:
        index = torch.nn.functional.pad(index, (1, 0, 1, 0), value=geometry.offsets + 1)
        index[1:, 0] = geometry.offsets + 2
        index[0, 0] = geometry.offsets
    return index


def missing_pairs(geometry: RelationGeometry, device: torch.device) -> Tensor:
    """Which pairs do not exist, as an (n, n) mask."""
    tokens = torch.arange(geometry.patches, device=device)
    row, col = tokens // geometry.width, tokens % geometry.width
    down = row[:, None] - row[None, :]
    rows, cols = geometry.reach
    missing = (down.abs() > rows) | ((col[:, None] - col[None, :]).abs() > cols)
    if geometry.causal:
        missing |= down < 0
    return torch.nn.functional.pad(missing, (1, 0, 1, 0)) if geometry.class_token else missing


def dropout_noise(like: Tensor, dropout: float, seed: int) -> Tensor:
    """Nought with the probability of dropout, else 1 / (1 − dropout): the same for the same seed.

    Backward makes it again instead of keeping it.
    """
    generator = torch.Generator(like.device)
    generator.manual_seed(seed)
    return torch.empty_like(like).bernoulli_(1 - dropout, generator=generator).div_(1 - dropout)


class Workspace:
    """Bounded scratch memory: four matrices of up to ``rows`` rows, reused by every relation.

    Args:
        like: a tensor of the dtype and device to work in.
        pairs_per_call: most pairs that one relation has in the whole batch.
        cols: most columns of a rectangle of pairs, the smallest piece of work.
        widths: widths of the matrices.
        limit_bytes: the workspace stays under it unless one row of pairs alone is larger.
    """

    def __init__(self, like: Tensor, pairs_per_call: int, cols: int, widths: tuple[int, ...], limit_bytes: int) -> None:
        row_bytes = sum(widths) * like.element_size()
        self.rows = max(cols, min(pairs_per_call, limit_bytes // row_bytes))
        self._buffer = like.new_empty(self.rows * sum(widths))
        starts = [sum(widths[:n]) * self.rows for n in range(len(widths))]
        self._matrices = tuple(
            self._buffer[start : start + self.rows * width].view(self.rows, width)
            for start, width in zip(starts, widths, strict=True)
        )

    def matrix(self, index: int, rows: int) -> Tensor:
        """The first rows of one of the matrices; whatever stood there is overwritten."""
        return self._matrices[index][:rows]

    def gather(self, index: int, view: Tensor) -> Tensor:
        """Token rows (b, r, s, c) as a matrix (b·r·s, c), copied only if they are not one already."""
        rows = view.shape[0] * view.shape[1] * view.shape[2]
        if view.is_contiguous():
            return view.view(rows, view.shape[3])
        matrix = self.matrix(index, rows)
        matrix.view(view.shape).copy_(view)
        return matrix

    def gathered(self, index: int, view: Tensor) -> Tensor:
        """The matrix that the last `gather` of this view gave, while nothing has overwritten it."""
        rows = view.shape[0] * view.shape[1] * view.shape[2]
        return view.view(rows, view.shape[3]) if view.is_contiguous() else self.matrix(index, rows)


class RelationContext:
    """Everything that the functions of one call share but autograd must not see.

    Forward it holds the logits, then the attention weights (and the weights after dropout, which are
    what values are multiplied by) and the output; backward their
    gradients. The functions run in a chain that autograd orders, so that each finds here what the
    one before it left. Between forward and backward it holds no buffers: what backward needs is
    saved once, by the last function of the chain, where checkpointing and saved-tensor hooks see it.
    """

    def __init__(self, geometry: RelationGeometry, heads: int, scale: float, workspace_bytes: int) -> None:
        self.geometry = geometry
        self.heads = heads
        self.scale = scale
        self.workspace_bytes = workspace_bytes
        self.widths = (0, 0)
        self.dropout = 0.0
        self.seed = 0
        self.adds_logits = False
        self.key_padding: Tensor | None = None
        self.source: dict[str, Tensor] = {}
        self.relative: frozenset[str] = frozenset()
        self.wanted: frozenset[str] = frozenset()
        self.logits: Tensor | None = None
        self.attention: Tensor | None = None
        self.weights: Tensor | None = None
        self.out: Tensor | None = None
        self.batched = False
        self._workspace: Workspace | None = None
        self.grad_out: Tensor | None = None
        self.grad_attention: Tensor | None = None
        self.grads: dict[str, Tensor] = {}

    def open_workspace(self) -> None:
        """Allocate the scratch memory of a forward or backward pass, where it is sure to be needed."""
        if self.relative and not self.batched:
            self.scratch()

    def scratch(self) -> Workspace:
        """The scratch memory, allocated when it is first asked for."""
        if self._workspace is None:
            self._workspace = self._make_workspace(next(iter(self.source.values())))
        return self._workspace

    def _make_workspace(self, like: Tensor) -> Workspace:
        d_in, d_out = self.widths
        largest = like.shape[0] * self.geometry.patches
        widths = (d_in, d_in, d_out, d_out)
        # Beside chunks of many relations, which have the rest of the limit.
        limit = self.workspace_bytes // 4 if self.batched else self.workspace_bytes
        return Workspace(like, largest, self.geometry.width, widths, limit)

    def drop(self, x_bhnn: Tensor) -> Tensor:
        """The tensor with this call's dropout applied, always the same one; itself without dropout."""
        return x_bhnn * dropout_noise(x_bhnn, self.dropout, self.seed) if self.dropout else x_bhnn

    def close(self) -> None:
        """Drop every buffer."""
        self.source, self.grads = {}, {}
        self.logits = self.attention = self.weights = self.out = self._workspace = None
        self.grad_out = self.grad_attention = None

    def pieces(self, pairs: RelationPairs, batch: int) -> Iterator[tuple[slice, slice]]:
        """Split a relation's pairs into (samples, rows) that fit the workspace."""
        limit = self.scratch().rows
        samples = limit // pairs.count
        if samples:
            for start in range(0, batch, samples):
                yield slice(start, min(start + samples, batch)), slice(0, pairs.rows)
            return
        rows = max(1, limit // pairs.cols)
        for sample in range(batch):
            for start in range(0, pairs.rows, rows):
                yield slice(sample, sample + 1), slice(start, min(start + rows, pairs.rows))
