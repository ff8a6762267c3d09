"""Translution, α-Translution and attention as PyTorch layers, and the networks made of them."""

from .integrations.timm import load_tables, replace_attention, tables_from_state_dict
from .layers.attention import AbsoluteTranslution, BiasAttention, SelfAttention, ShawAttention
from .layers.translution import AlphaTranslution, Translution
from .networks.build import build
from .networks.load import load_network

__all__ = [
    "AbsoluteTranslution",
    "AlphaTranslution",
    "BiasAttention",
    "SelfAttention",
    "ShawAttention",
    "Translution",
    "build",
    "load_network",
    "load_tables",
    "replace_attention",
    "tables_from_state_dict",
]
