"""The calls of timm's and Hugging Face's attention, passed on to a layer of this project."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .layer import AdaptedTranslution


class WrappedLayer(nn.Module):
    """A layer with the mask of an attention, and the dropout after its output projection.

    Args:
        layer: the layer.
        places: the layer's token of each token of the network; the layer's other tokens are padding.
        drop: module that follows the output projection.
        returns_tuple: True if the attention returns its output and its weights, of which there are none here.
    """

    places: Tensor

    def __init__(
        self, layer: AdaptedTranslution, places: Sequence[int], drop: nn.Module, *, returns_tuple: bool = False
    ) -> None:
        super().__init__()
        self.layer, self.drop, self.returns_tuple = layer, drop, returns_tuple
        self.padded = len(places) < layer.geometry.tokens
        self.register_buffer("places", torch.tensor(places), persistent=False)

    def attend(self, x_bnc: Tensor, mask: Tensor | None) -> Tensor:
        """(B, N, C) → (B, N, C).

        Args:
            x_bnc: the tokens.
            mask: added to the logits, or true where a pair exists: (N, N), (W, N, N) for the W windows of which each
                image has one after the other, or (B or 1, h or 1, N, N); None for all pairs.
        """
        if mask is not None:
            mask = self._additive(mask, x_bnc)
        padding = None
        if self.padded:
            tokens, places = self.layer.geometry.tokens, self.places
            x_bnc = x_bnc.new_zeros(len(x_bnc), tokens, x_bnc.shape[2]).index_copy(1, places, x_bnc)
            padding = torch.ones(tokens, dtype=torch.bool, device=x_bnc.device)
            padding = padding.index_fill(0, places, False).expand(len(x_bnc), -1)
            if mask is not None:
                whole = mask.new_zeros(*mask.shape[:2], tokens, tokens)
                whole[:, :, places[:, None], places] = mask
                mask = whole
        out = self.layer.attend(x_bnc, mask, padding)
        result: Tensor = self.drop(out[:, self.places] if self.padded else out)
        return result

    @staticmethod
    def _additive(mask: Tensor, x_bnc: Tensor) -> Tensor:
        if mask.dtype is torch.bool:
            mask = torch.zeros_like(mask, dtype=x_bnc.dtype).masked_fill(~mask, -torch.inf)
        if mask.ndim == 2:
            return mask[None, None]
        return mask.repeat(len(x_bnc) // len(mask), 1, 1).unsqueeze(1) if mask.ndim == 3 else mask


class TimmLayer(WrappedLayer):
    """Called as the attention of timm's vision transformers is."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """(B, N, C) → (B, N, C).

        Args:
            x: the tokens.
            attn_mask: as in `WrappedLayer.attend`.
            is_causal: True if a token sees itself and earlier ones only.
        """
        if is_causal:
            later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
            causal = torch.zeros_like(later, dtype=x.dtype).masked_fill(later, -torch.inf)
            attn_mask = causal if attn_mask is None else causal + self._additive(attn_mask, x)
        return self.attend(x, attn_mask)


class WindowLayer(WrappedLayer):
    """Called as the attention of timm's Swin transformers is."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B·W, N, C) → (B·W, N, C) for W windows of an image; the mask is (W, N, N) or None."""
        return self.attend(x, mask)


class HuggingFaceLayer(WrappedLayer):
    """Called as the attention of Hugging Face's vision transformers is."""

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **_: Any
    ) -> Tensor | tuple[Tensor, None]:
        """(B, N, C) → (B, N, C), and None in place of the attention weights if the attention returned them.

        Args:
            hidden_states: the tokens.
            attention_mask: as in `WrappedLayer.attend`.
        """
        out = self.attend(hidden_states, attention_mask)
        return (out, None) if self.returns_tuple else out
