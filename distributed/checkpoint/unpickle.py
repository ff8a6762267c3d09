"""Reading torch's files without DeepSpeed, and without running what a file says.

A checkpoint of DeepSpeed's names a few of its classes. Nothing but their fields is wanted: each becomes a plain object,
and any other name beyond tensors and containers is refused.
"""

from __future__ import annotations

import pickle
import types
from pathlib import Path
from typing import Any

import torch

from translution.planner.common.errors import InputError

_KNOWN = {
    "collections.OrderedDict", "torch.Size", "torch.Tensor", "torch.device", "torch.nn.parameter.Parameter",
    "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_parameter", "torch._tensor._rebuild_from_type_v2",
}  # fmt: skip


class Fields:
    """An object of a class that is not loaded, with its fields."""

    def __init__(self, *values: object) -> None:
        self.values = values


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module.split(".")[0] == "deepspeed":
            return Fields
        if f"{module}.{name}" in _KNOWN or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} is not allowed in a checkpoint")


_PICKLE = types.SimpleNamespace(Unpickler=_Unpickler, load=None, __name__="pickle")


def load_file(path: Path) -> Any:
    """What a file of torch's holds; tensors are mapped, and read when they are used.

    Raises:
        InputError: if it is damaged, or holds what no checkpoint does.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=False, mmap=True, pickle_module=_PICKLE)
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        raise InputError(f"{path}: cannot be read: {' '.join(str(error).split())[:200]}") from None
