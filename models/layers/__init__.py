"""The operators as PyTorch layers, (B, N, C) → (B, N, C), and the tables that hold their matrices.

translution    full and low-rank Translution (`Translution`, `AlphaTranslution`)
attention      the baselines: self-attention, scalar bias, relative vectors, a matrix per position
tables         relation tables stored as tiles, and the chain of modules that calls the operator
owned_tables   the tables of one rank of a group that shares out the relations
base           common arguments of all layers and their checks
"""

from .attention import AbsoluteTranslution, BiasAttention, DenseAttention, SelfAttention, ShawAttention
from .base import OperatorLayer
from .owned_tables import OwnedTables
from .tables import RelationTables, Tile
from .translution import AlphaTranslution, Translution

__all__ = [
    "AbsoluteTranslution",
    "AlphaTranslution",
    "BiasAttention",
    "DenseAttention",
    "OperatorLayer",
    "OwnedTables",
    "RelationTables",
    "SelfAttention",
    "ShawAttention",
    "Tile",
    "Translution",
]
