"""The vision transformer, for images and for clips."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from translution.planner.common import InputError
from translution.planner.config import VideoSpec, VitSpec

from .blocks import Block, LearnedTokens, apply_checkpointing, make_norm


class PatchEmbedding(nn.Module):
    """Images (B, channels, H, W) or clips (B, channels, frames, H, W) → patch tokens (B, patches, C).

    Args:
        spec: the model.
    """

    def __init__(self, spec: VitSpec | VideoSpec) -> None:
        super().__init__()
        self.patch, self.grid, self.sample_shape = spec.patch_extents, spec.grid, spec.sample_shape
        self.patch_norm = make_norm(spec, spec.patch_dim)
        self.projection = nn.Linear(spec.patch_dim, spec.dim, bias=spec.bias)
        self.norm = make_norm(spec, spec.dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, H, W) or (B, channels, frames, H, W) → (B, patches, C).

        Patches are in row-major order; the values of a patch are ordered by frame, row, column and channel.
        """
        axes = len(self.grid)
        if x.shape[1:] != self.sample_shape:
            what = "image" if axes == 2 else "clip"
            raise InputError(f"{what}: shape {tuple(x.shape)} is not allowed: must be (batch, *{self.sample_shape})")
        for axis in reversed(range(axes)):
            x = x.unflatten(2 + axis, (self.grid[axis], self.patch[axis]))
        cells, inside = range(2, 2 + 2 * axes, 2), range(3, 3 + 2 * axes, 2)
        x = x.permute(0, *cells, *inside, 1).flatten(1 + axes).flatten(1, axes)
        result: Tensor = self.norm(self.projection(self.patch_norm(x)))
        return result


class VisionTransformer(nn.Module):
    """Vision transformer: images (B, channels, H, W) or clips (B, channels, frames, H, W) → class logits (B, classes).

    Args:
        spec: the model.
        operators: one layer (B, N, C) → (B, N, C) for each block.
    """

    def __init__(self, spec: VitSpec | VideoSpec, operators: list[nn.Module]) -> None:
        super().__init__()
        self.pool = spec.pool
        self.embedding = PatchEmbedding(spec)
        self.class_token = LearnedTokens(1, spec.dim, spec.token_init_std) if spec.class_token else None
        self.positions = LearnedTokens(spec.tokens, spec.dim, spec.token_init_std) if spec.learned_positions else None
        self.dropout = nn.Dropout(spec.dropout)
        self.blocks = nn.ModuleList(
            apply_checkpointing(Block(spec, operator), spec.checkpointing) for operator in operators
        )
        self.norm = make_norm(spec, spec.dim)
        self.head = nn.Linear(spec.dim, spec.classes, bias=spec.bias)

    def features(self, x: Tensor) -> Tensor:
        """(B, channels, H, W) or (B, channels, frames, H, W) → tokens after the last norm, (B, N, C)."""
        x = self.embedding(x)
        if self.class_token is not None:
            x = torch.cat([self.class_token(len(x)), x], dim=1)
        if self.positions is not None:
            x = x + self.positions(len(x))
        x = self.dropout(x)
        for block in self.blocks:
            x = block(x)
        result: Tensor = self.norm(x)
        return result

    def pooled(self, x_bnc: Tensor) -> Tensor:
        """Tokens (B, N, C) → the class token or the mean over tokens, (B, C)."""
        return x_bnc[:, 0] if self.pool == "class" else x_bnc.mean(dim=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, H, W) or (B, channels, frames, H, W) → (B, classes)."""
        x = self.features(x)
        result: Tensor = self.head(self.pooled(x))
        return result
