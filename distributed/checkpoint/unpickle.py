"""Reads torch's files without importing DeepSpeed and without executing code from the file.

DeepSpeed's checkpoints contain objects of a few of its classes. Only their fields are needed, so each becomes a plain
object. Any other class, except tensors and containers, is refused.
"""

from __future__ import annotations

import pickle
import types
from pathlib import Path
from typing import Any

import torch

from translution.planner.common import InputError

_KNOWN = {
    "collections.OrderedDict", "torch.Size", "torch.Tensor", "torch.device", "torch.nn.parameter.Parameter",
    "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_parameter", "torch._tensor._rebuild_from_type_v2",
}  # fmt: skip


class Fields:
    """Stands for an object of a class of DeepSpeed, with the same fields."""

    def __init__(self, *values: object) -> None:
        self.values = values


def _member(owner: object, name: object) -> Fields:
    """Stands for ``getattr``, by which Python 3.11.0 to 3.11.3 write members of an Enum; only of DeepSpeed's classes.

    Source: CPython 3.11.2, Lib/enum.py, Enum.__reduce_ex__.
    """
    if owner is not Fields:
        raise pickle.UnpicklingError(f"getattr of {owner!r} is not allowed in a checkpoint")
    return Fields(name)


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module in ("builtins", "__builtin__") and name == "getattr":
            return _member
        if module.split(".")[0] == "deepspeed":
            return Fields
        if f"{module}.{name}" in _KNOWN or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} is not allowed in a checkpoint")


_PICKLE = types.SimpleNamespace(Unpickler=_Unpickler, load=None, __name__="pickle")


def load_file(path: Path) -> Any:
    """Load a file of torch's; tensors are memory-mapped and read when they are used.

    Raises:
        InputError: if the file is damaged or contains a class that is not allowed.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=False, mmap=True, pickle_module=_PICKLE)
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        raise InputError(f"{path}: cannot be read: {' '.join(str(error).split())[:200]}") from None
