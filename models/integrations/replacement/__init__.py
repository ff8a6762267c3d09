"""Translution in place of the attention of other networks: timm's and Hugging Face's vision transformers.

replace    replace the attention of some blocks (`replace_attention`)
found      what an attention consists of: heads, weights, call signature; and how a network's tokens lie
layer      Translution with an attention's further terms: query bias, scalars per relation, masks
wrapped    the calls of timm's and Hugging Face's attention, passed on to the layer
"""

from .replace import replace_attention

__all__ = ["replace_attention"]
