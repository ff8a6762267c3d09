"""Reads torch's files without importing DeepSpeed and without executing code from the file.

DeepSpeed's checkpoints contain objects of a few of its classes. Only their fields are needed, so each becomes a plain
object. Any other class, except tensors and containers, is refused.
"""

from __future__ import annotations

import pickle
import types
import zipfile
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from translution.planner.common import InputError

_KNOWN = {
    "collections.OrderedDict", "torch.Size", "torch.Tensor", "torch.device", "torch.nn.parameter.Parameter",
    "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_parameter", "torch._tensor._rebuild_from_type_v2",
}  # fmt: skip


_DEEPSPEED = {
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler", "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum", "deepspeed.utils.tensor_fragment.fragment_address",
}  # fmt: skip
"""The only classes of DeepSpeed in its checkpoints; it makes objects of them when it loads a file itself."""


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
        if f"{module}.{name}" in _DEEPSPEED:
            return Fields
        if f"{module}.{name}" in _KNOWN or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} is not allowed in a checkpoint")


_PICKLE = types.SimpleNamespace(Unpickler=_Unpickler, load=None, __name__="pickle")


def _check_archive(path: Path) -> None:
    """Check that a file is an archive as torch.save writes it: other kinds reach code that no unpickler guards.

    Raises:
        zipfile.BadZipFile: if it is none.
    """
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    if len(set(names)) < len(names):
        # Readers differ in which one they take.
        raise zipfile.BadZipFile("two members have one name")
    if any(PurePosixPath(name).name == "constants.pkl" for name in names):
        raise zipfile.BadZipFile("it is a TorchScript archive, which is a program")


def load_file(path: Path) -> Any:
    """Load a file of torch's; tensors are memory-mapped and read when they are used.

    Raises:
        InputError: if the file is damaged or contains a class that is not allowed.
    """
    try:
        _check_archive(path)
        return torch.load(path, map_location="cpu", weights_only=False, mmap=True, pickle_module=_PICKLE)
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
        raise InputError(f"{path}: cannot be read: {' '.join(str(error).split())[:200]}") from None


def require_harmless(folder: Path, *, part: int = 0, parts: int = 1) -> None:
    """Check that DeepSpeed can load a checkpoint's files, which it unpickles without a guard of its own.

    Args:
        folder: the checkpoint.
        part, parts: only every ``parts``-th file, from number ``part`` on, for ranks that share the work.

    Raises:
        InputError: names the first file that is damaged or contains anything besides tensors, containers and known
            classes.
    """
    for path in sorted(folder.rglob("*.pt"))[part::parts]:
        load_file(path)
