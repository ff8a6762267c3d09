"""The vision transformer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from translution.planner.common import InputError
from translution.planner.config import VitSpec

from .blocks import Block, LearnedTokens, apply_checkpointing, make_norm


class PatchEmbedding(nn.Module):
    """Images (B, channels, H, W) → patch tokens (B, patches, C).

    Args:
        spec: the model.
    """

    def __init__(self, spec: VitSpec) -> None:
        super().__init__()
        self.image, self.patch, self.grid = spec.image, spec.patch, spec.grid
        self.channels = spec.channels
        self.patch_norm = make_norm(spec, spec.patch_dim)
        self.projection = nn.Linear(spec.patch_dim, spec.dim, bias=spec.bias)
        self.norm = make_norm(spec, spec.dim)

    def forward(self, image_bchw: Tensor) -> Tensor:
        """(B, channels, H, W) → (B, patches, C).

        Patches are in row-major order; the values of a patch are ordered by row, column and channel.
        """
        expected = (self.channels, *self.image)
        if image_bchw.ndim != 4 or image_bchw.shape[1:] != expected:
            raise InputError(f"image: shape {tuple(image_bchw.shape)} is not allowed: must be (batch, *{expected})")
        x = image_bchw.unflatten(3, (self.grid[1], self.patch[1])).unflatten(2, (self.grid[0], self.patch[0]))
        x = x.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
        result: Tensor = self.norm(self.projection(self.patch_norm(x)))
        return result


class VisionTransformer(nn.Module):
    """Vision transformer: images (B, channels, H, W) → class logits (B, classes).

    Args:
        spec: the model.
        operators: one layer (B, N, C) → (B, N, C) for each block.
    """

    def __init__(self, spec: VitSpec, operators: list[nn.Module]) -> None:
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

    def forward(self, image_bchw: Tensor) -> Tensor:
        """(B, channels, H, W) → (B, classes)."""
        x = self.embedding(image_bchw)
        if self.class_token is not None:
            x = torch.cat([self.class_token(len(x)), x], dim=1)
        if self.positions is not None:
            x = x + self.positions(len(x))
        x = self.dropout(x)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        result: Tensor = self.head(x[:, 0] if self.pool == "class" else x.mean(dim=1))
        return result
