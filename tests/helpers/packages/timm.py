"""timm without torchvision, whose builds on PyPI need CUDA's libraries."""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType
from typing import Any

import pytest
from torch import nn

_NEEDED = (
    "torchvision",
    "torchvision.datasets",
    "torchvision.models",
    "torchvision.models.feature_extraction",
    "torchvision.ops",
    "torchvision.ops.misc",
    "torchvision.transforms",
    "torchvision.transforms.functional",
)
"""Modules of torchvision that timm imports; vision transformers use nothing of them."""


class _Unused(nn.Module):
    """In place of whatever torchvision has."""

    NEAREST, BILINEAR, BICUBIC, BOX, HAMMING, LANCZOS = "nearest", "bilinear", "bicubic", "box", "hamming", "lanczos"


def _find(name: str) -> object:
    if name.startswith("__"):
        raise AttributeError(name)
    return sys.modules.get(f"torchvision.{name}", _Unused)


def load_timm() -> Any:
    """Return timm, imported with an empty torchvision if there is none.

    The empty one is removed again: other packages look whether torchvision is there.
    """
    if "timm" in sys.modules or importlib.util.find_spec("torchvision"):
        return importlib.import_module("timm")
    with pytest.MonkeyPatch.context() as patch:
        for name in _NEEDED:
            module = ModuleType(name)
            vars(module)["__getattr__"] = _find
            patch.setitem(sys.modules, name, module)
        return importlib.import_module("timm")
