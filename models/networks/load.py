"""Load a network from the file that ``translution export`` writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from translution.planner.common import InputError, MissingPackageError
from translution.planner.config import ModelSpec, network_spec

from ..layers.attention import RotaryEmbedding
from .build import build
from .gpt import LanguageModel
from .vit import VisionTransformer


def load_network(path: Path | str) -> VisionTransformer | LanguageModel:
    """Load an exported network into one process, in evaluation mode.

    The network is built without values, then takes one tensor after the other from the memory-mapped file.

    Args:
        path: safetensors file with the model's spec in its metadata.

    Returns:
        A vision transformer or a language model, with the shapes of `build`.

    Raises:
        InputError: if the file is missing, truncated or in another format, or if a tensor is missing, unexpected or of
            the wrong shape.
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
            network = empty_network(network_spec(path))
            _load_tensors(network, file, path)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: not a complete safetensors file: {' '.join(str(error).split())[:200]}") from None
    return network.eval()


def empty_network(spec: ModelSpec) -> VisionTransformer | LanguageModel:
    """Build the network of a spec on the meta device: its parameters have shapes but no values.

    Tables are untiled, and activation checkpointing is off, since it only matters for backward.

    Args:
        spec: the model.
    """
    with torch.device("meta"):
        network = build(spec.model_copy(update={"checkpointing": "none"}))
    for module in network.modules():
        if isinstance(module, RotaryEmbedding):
            module.reset()
    return network


def _load_tensors(network: nn.Module, file: Any, path: Path) -> None:
    """Replace the network's parameters by the tensors of a file, in the file's dtype."""
    wanted, stored = dict(network.named_parameters()), set(file.keys())
    for name in sorted({*wanted, *stored}):
        if name not in stored:
            raise InputError(f"{path}: tensor {name} of the model is missing")
        if name not in wanted:
            raise InputError(f"{path}: tensor {name} is not in the model")
        shape = tuple(file.get_slice(name).get_shape())
        if shape != tuple(wanted[name].shape):
            raise InputError(f"{name}: shape {shape} is not allowed: must be {tuple(wanted[name].shape)} ({path})")
    dtype = None
    for name in wanted:
        owner, _, leaf = name.rpartition(".")
        values = file.get_tensor(name)
        network.get_submodule(owner).register_parameter(leaf, nn.Parameter(values))
        dtype = values.dtype
    if isinstance(network, LanguageModel):
        network.tie()
    for module in network.modules():
        if isinstance(module, RotaryEmbedding):
            module.to(dtype)
