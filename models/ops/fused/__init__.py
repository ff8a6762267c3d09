"""The fused operator: Triton kernels that keep projected rows on the chip.

kernels    the Triton kernels; the only module that imports triton, when the first kernel runs
tile       the products of one tile: which kernel runs over which relations
blocks     lists of pairs and of blocks of rows
configs    sizes of the kernels' blocks, and the choice of the fastest
support    where the fused operator can be used, and a trial of it
"""

from .support import fused_is_correct, fused_problem
from .tile import FusedTile

__all__ = ["FusedTile", "fused_is_correct", "fused_problem"]
