"""Vision transformer and language model, built from a spec or loaded from a file.

build     a network from a spec (`build`), and the operator of each block (`make_operator`)
load      a network from an exported safetensors file (`load_network`)
vit       the vision transformer
gpt       the causal language model
head      the language model's head, and its loss in chunks of tokens
blocks    transformer block, feed-forward network, activation checkpointing
"""

from .blocks import Block
from .build import build, make_operator
from .gpt import LanguageModel
from .load import empty_network, load_network
from .vit import VisionTransformer

__all__ = [
    "Block",
    "LanguageModel",
    "VisionTransformer",
    "build",
    "empty_network",
    "load_network",
    "make_operator",
]
