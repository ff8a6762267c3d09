"""Reads the state dict of a checkpoint of the authors' code."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from translution.planner.common import InputError

_PREFIX = "module."
"""What DataParallel and DistributedDataParallel put before every key."""


class PublishedFile(NamedTuple):
    """What a checkpoint holds."""

    tensors: dict[str, Tensor]
    """Tensors by the authors' keys."""
    arch: str | None
    """Name of the network in the authors' code; null in a bare state dict."""


def read_published(path: Path | str) -> PublishedFile:
    """Read a state dict, or a training checkpoint around one.

    Args:
        path: safetensors file, or what torch.save has written (``.pt``, ``.pth``); no code in it is run.

    Raises:
        InputError: if the file is missing, damaged or holds no state dict.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: {'must be a file' if path.exists() else 'no such file'}")
    values = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    arch = values.get("arch")
    inner = values.get("state_dict", values)
    if not isinstance(inner, Mapping) or not inner:
        raise InputError(f"{path}: holds no state dict")
    for key, value in inner.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise InputError(f"{path}: {str(key)[:60]} is no tensor: must be a state dict, or a checkpoint with one")
    prefix = _PREFIX if all(key.startswith(_PREFIX) for key in inner) else ""
    return PublishedFile(
        {key.removeprefix(prefix): value for key, value in inner.items()}, arch if isinstance(arch, str) else None
    )


def _read_safetensors(path: Path) -> dict[str, Any]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  # a handle, not a dict
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: not a complete safetensors file: {' '.join(str(error).split())[:200]}") from None


def _read_torch(path: Path) -> dict[str, Any]:
    try:
        values = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from None
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, IndexError):
        # torch's reasons are about its own options, and of some files only a number.
        raise InputError(f"{path}: not a file that torch.save has written, or with more than tensors in it") from None
    if not isinstance(values, dict):
        raise InputError(f"{path}: holds a {type(values).__name__}: must be a state dict, or a checkpoint with one")
    return values
