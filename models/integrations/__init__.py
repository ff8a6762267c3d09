"""Connections to other code's networks and weights.

replacement         replace the attention of timm's or Hugging Face's vision transformers (`replace_attention`)
huggingface         the networks as `PreTrainedModel`s; needs transformers, so nothing imports it by default
timm                the presets as models of timm; needs timm, so nothing imports it by default
published           networks of the published code, both ways (`load_published`, `to_published`)
published_tables    load relation tables of the published code (`tables_from_state_dict`, `load_tables`)
"""

from .published import load_published, to_published
from .published_tables import load_tables, tables_from_state_dict
from .replacement import replace_attention

__all__ = ["load_published", "load_tables", "replace_attention", "tables_from_state_dict", "to_published"]
