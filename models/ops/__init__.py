"""The operators as autograd functions: the grouped operator, forward and backward, and its slow reference.

naive              the slow reference: a matrix copied for every pair and sample
grouped            the grouped operator, one relation at a time: logits, softmax and values, each with its backward
functional         the operator in torch's own functions, for torch.func
batched            many relations at a time, for a GPU
fused              Triton kernels, for an NVIDIA GPU
relation_parallel  the operator on ranks that share out the relations
implementations    which of these a call uses
compiled           the whole call as a custom operator, for compiled models
grouped_mm         grouped matrix products, for batched
pair_index         index lists of the pairs of several relations, for batched
relative_terms     a scalar or a vector per relation instead of a matrix
context            state and scratch memory of one call, relation indices, masks, dropout factors
rotary             rotary position embedding
"""

from . import batched
from .context import missing_pairs
from .grouped_mm import GroupedProducts, SeparateProducts, choose_products
from .relative_terms import RelationBias, RelationVectors

__all__ = [
    "GroupedProducts",
    "RelationBias",
    "RelationVectors",
    "SeparateProducts",
    "batched",
    "choose_products",
    "missing_pairs",
]
