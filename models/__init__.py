"""Translution, α-Translution and attention as PyTorch layers, and the networks made of them."""

from .layers import AlphaTranslution, SelfAttention, Translution
from .networks import build

__all__ = ["AlphaTranslution", "SelfAttention", "Translution", "build"]
