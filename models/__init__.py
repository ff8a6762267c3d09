"""Translution, α-Translution and attention in PyTorch: layers, networks, and their use in other networks.

Layers, (B, N, C) → (B, N, C), B samples of N tokens of width C:
    Translution, AlphaTranslution                  full and low-rank Translution
    SelfAttention, BiasAttention, ShawAttention    attention with plain, scalar and vector relations
    AbsoluteTranslution                            a matrix per position
Networks:
    build                      network of a spec
    load_network               network of an exported file
    VisionTransformer          images (B, channels, H, W) → logits (B, classes)
    LanguageModel              token ids (B, context) → logits (B, context, vocabulary)
Other networks and weights:
    replace_attention          Translution in timm's or Hugging Face's vision transformer, changed in place
    tables_from_state_dict     tables of the published code, (R, C, C') for each role
    load_tables                copy such tables into a layer of any tiling
    load_published             network of a checkpoint of the published code
    to_published               state dict of a network for the published code

Packages, each importing only those before it:
    ops                the operators as autograd functions, forward and backward, and their slow reference
    layers             the layers, and the tables that hold their matrices
    networks           the networks
    integrations       other networks and weights
    relation_parallel  layers whose relations several ranks share out, in a plain torch loop
"""

from .integrations import load_published, load_tables, replace_attention, tables_from_state_dict, to_published
from .layers import (
    AbsoluteTranslution,
    AlphaTranslution,
    BiasAttention,
    SelfAttention,
    ShawAttention,
    Translution,
)
from .networks import LanguageModel, VisionTransformer, build, load_network

__all__ = [
    "AbsoluteTranslution",
    "AlphaTranslution",
    "BiasAttention",
    "LanguageModel",
    "SelfAttention",
    "ShawAttention",
    "Translution",
    "VisionTransformer",
    "build",
    "load_network",
    "load_published",
    "load_tables",
    "replace_attention",
    "tables_from_state_dict",
    "to_published",
]
