"""A network from the one file that ``translution export`` writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from translution.planner.common.errors import InputError, MissingPackageError
from translution.planner.config.model import ModelSpec, parse_model_spec

from ..layers.attention import RotaryTurn
from .build import build

if TYPE_CHECKING:
    from .gpt import LanguageModel
    from .vit import VisionTransformer

SPEC = "model_spec"
"""The entry of the file's metadata that holds the model's spec, as JSON."""


def load_network(path: Path | str) -> VisionTransformer | LanguageModel:
    """The network of an exported file, for one process, in evaluation mode.

    It is built without values and takes one tensor after another from the file, which is mapped into memory.

    Args:
        path: a safetensors file with the model's spec in its metadata.

    Raises:
        InputError: if the file is absent, cut short or of another kind, or a tensor is missing, unknown or has another
            shape.
        MissingPackageError: without safetensors.
    """
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError:
        raise MissingPackageError("safetensors is missing: pip install 'translution-scale[train]'") from None
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            network = empty_network(_spec(file.metadata() or {}, path))
            _take(network, file, path)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: is not a whole safetensors file: {' '.join(str(error).split())[:200]}") from None
    return network.eval()


def _spec(metadata: dict[str, str], path: Path) -> ModelSpec:
    if SPEC not in metadata:
        raise InputError(f"{path}: holds no {SPEC!r} in its metadata: must be written by translution export")
    try:
        values = json.loads(metadata[SPEC])
    except ValueError as error:
        raise InputError(f"{path}: {SPEC} is not valid JSON: {error}") from None
    return parse_model_spec(values, what=f"{path}: {SPEC}")


def empty_network(spec: ModelSpec) -> VisionTransformer | LanguageModel:
    """The network of a spec with whole tables, whose parameters have shapes and no values.

    Args:
        spec: the model; activations are not recomputed, which changes nothing without backward.
    """
    with torch.device("meta"):
        network = build(spec.model_copy(update={"checkpointing": "none"}))
    for module in network.modules():
        if isinstance(module, RotaryTurn):
            module.reset()
    return network


def _take(network: nn.Module, file: Any, path: Path) -> None:
    """Put every tensor of a file where it belongs."""
    wanted, held = dict(network.named_parameters()), set(file.keys())
    for name in sorted({*wanted, *held}):
        if name not in held:
            raise InputError(f"{path}: holds no tensor {name}, which the model has")
        if name not in wanted:
            raise InputError(f"{path}: holds a tensor {name}, which the model has not")
        shape = tuple(file.get_slice(name).get_shape())
        if shape != tuple(wanted[name].shape):
            raise InputError(f"{name}: shape {shape} is not allowed: must be {tuple(wanted[name].shape)} ({path})")
    dtype = None
    for name in wanted:
        owner, _, leaf = name.rpartition(".")
        values = file.get_tensor(name)
        network.get_submodule(owner).register_parameter(leaf, nn.Parameter(values))
        dtype = values.dtype
    for module in network.modules():
        if isinstance(module, RotaryTurn):
            module.to(dtype)
