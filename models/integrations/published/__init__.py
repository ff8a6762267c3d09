"""Networks of the authors' code (github.com/hehefan/Translution), both ways.

files        reads a checkpoint
fields       finds the spec in keys and shapes
revisions    which table is which, by commit
rules        tensor by tensor, forth and back
load         `load_published`, `to_published`
"""

from __future__ import annotations

from .load import load_published, to_published

__all__ = ["load_published", "to_published"]
