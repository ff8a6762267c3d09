"""The fused operator: Triton kernels that keep projected rows on the chip.

kernels             Triton kernels of logits and values, and what all kernels share
gradient_kernels    Triton kernels of backward; they and kernels import triton, when the first kernel runs
tile                the products of one tile: which kernel runs over which relations
blocks              lists of pairs and of blocks of rows
configs             sizes of the kernels' blocks, and the choice of the fastest
support             where the fused operator can be used, and a trial of it
"""

from .configs import tuning_record
from .support import fp32_products_use_tf32, fused_is_correct, fused_problem
from .tile import FusedTile

__all__ = ["FusedTile", "fp32_products_use_tf32", "fused_is_correct", "fused_problem", "tuning_record"]
