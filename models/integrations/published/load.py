"""Loads networks of the authors' code, and writes ours in their present layout."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from translution.planner.common import InputError
from translution.planner.config import GptSpec, ModelSpec, VitSpec, parse_model_spec

from ...networks.gpt import LanguageModel
from ...networks.load import empty_network
from ...networks.vit import VisionTransformer
from ...ops.rotary import rotary_angles
from .fields import find_fields
from .files import read_published
from .revisions import Convention, find_convention
from .rules import published_rules

_CACHES = ("causal", "rope.", "rotary_emb.")
"""What a layer's state dict has besides weights."""


def load_published(
    path: Path | str, *, revision: str | None = None, **fields: Any
) -> tuple[ModelSpec, VisionTransformer | LanguageModel]:
    """Load a checkpoint of the authors' code as a network of this project, in evaluation mode.

    Args:
        path: safetensors file, or a file of torch.save, with a state dict or a training checkpoint around it.
        revision: the commit of github.com/hehefan/Translution that trained it, or "old" or "new"; required where
            neither the preset's name in the checkpoint nor the tables tell which table is the query's.
        **fields: fields of the spec that the file does not tell, such as ``heads=2, image=(8, 12), patch=(4, 4)``,
            ``pool="mean"``.

    Returns:
        The network's spec, and the network with full tables.

    Raises:
        InputError: if the file is missing or damaged, a field is required or contradicts the file, the revision is
            unknown, or a tensor is missing, unexpected or of the wrong shape.
    """
    try:
        return _load(Path(path), revision, fields)
    except InputError as error:
        text = str(error)
        raise InputError(text if text.startswith(str(path)) else f"{path}: {text}") from None


def _load(
    path: Path, revision: str | None, fields: Mapping[str, Any]
) -> tuple[ModelSpec, VisionTransformer | LanguageModel]:
    tensors, arch = read_published(path)
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
    trunk, found = find_fields(tensors, arch, given)
    spec = parse_model_spec({"name": arch or path.stem.split(".")[0]} | found, what="the file's network")
    convention = Convention.NEW
    if spec.operator in ("translution", "alpha") and {"q", "k"} <= set(spec.roles):
        convention = find_convention(spec.family, low_rank=spec.operator == "alpha", arch=arch, revision=revision)
    values = from_published(tensors, spec, trunk, convention)
    network = empty_network(spec)
    for name, parameter in list(network.named_parameters()):
        if values[name].shape != parameter.shape:
            raise InputError(
                f"{name}: shape {tuple(values[name].shape)} is not allowed: must be {tuple(parameter.shape)}"
            )
        owner, _, leaf = name.rpartition(".")
        network.get_submodule(owner).register_parameter(leaf, nn.Parameter(values[name]))
    return spec, network.eval()


def from_published(
    tensors: Mapping[str, Tensor], spec: ModelSpec, trunk: str, convention: Convention
) -> dict[str, Tensor]:
    """Return the tensors of our network by name, from a state dict of theirs.

    Args:
        tensors: state dict with the authors' keys.
        spec: the network.
        trunk: "translution" or "transformer", what the keys of the layers begin with.
        convention: what ``to_q`` and ``to_k`` hold.

    Raises:
        InputError: naming a key that is missing, not expected or of the wrong shape.
    """
    values: dict[str, Tensor] = {}
    left = {key for key in tensors if not key.startswith(f"{trunk}.layers.") or not _is_cache(key)}
    for rule in published_rules(spec, trunk, convention):
        if rule.theirs not in tensors:
            raise InputError(f"{rule.theirs} is missing in the file")
        left.remove(rule.theirs)
        try:
            ours = rule.forth(tensors[rule.theirs].detach())
        except IndexError:
            shape = tuple(tensors[rule.theirs].shape)
            raise InputError(f"{rule.theirs}: shape {shape} is not allowed for this network") from None
        values |= {name: tensor.contiguous() for name, tensor in zip(rule.ours, ours, strict=True)}
    if left:
        raise InputError(f"{min(left)} is no tensor of this network ({spec.operator} {spec.roles}, depth {spec.depth})")
    return values


def _is_cache(key: str) -> bool:
    leaf = key.split(".", 4)[-1]
    return leaf.startswith(_CACHES)


def to_published(network: nn.Module, spec: ModelSpec) -> dict[str, Tensor]:
    """Return the state dict of a network under the keys of the authors' present code, with its masks and caches.

    Args:
        network: a network with full tables, as `build` and `load_network` return.
        spec: its spec.

    Raises:
        InputError: naming the field of the spec that their code has no network for.
    """
    if not isinstance(spec, VitSpec | GptSpec):
        raise InputError(f"family: {spec.family!r} is not allowed: must be 'vit' or 'gpt' in the authors' code")
    if spec.operator not in ("attention", "translution", "alpha"):
        raise InputError(f"operator: {spec.operator!r} is not allowed: the authors' code has no such network")
    _check_expressible(spec)
    ours = dict(network.named_parameters())
    trunk = "transformer" if spec.operator == "attention" else "translution"
    result = {}
    for rule in published_rules(spec, trunk, Convention.NEW):
        result[rule.theirs] = rule.back([ours[name].detach() for name in rule.ours]).contiguous()
    for number, operator in enumerate(spec.layer_operators):
        layer = f"{trunk}.layers.{number}.0"
        if isinstance(spec, GptSpec) and (operator != "attention" or spec.attention_causal):
            size = spec.context
            result[f"{layer}.causal"] = torch.tril(torch.ones(size, size))[None, None]
        turned = spec.rotary_attention if operator == "attention" else spec.rotary
        if turned:
            result |= _caches(spec, layer)
    return result


def _caches(spec: ModelSpec, layer: str) -> dict[str, Tensor]:
    """Return a layer's caches of the rotary embedding: cosines and sines of every coordinate."""
    angles = rotary_angles(spec.geometry, spec.head_dim)
    vit = isinstance(spec, VitSpec)
    if isinstance(spec, VitSpec):
        angles = angles[int(spec.class_token) :].unflatten(0, spec.grid)[None]
    else:
        angles = angles[None, None]
    full = torch.cat([angles, angles], dim=-1)
    name = f"{layer}.{'rope' if vit else 'rotary_emb'}"
    return {f"{name}.cos_cached": full.cos().float(), f"{name}.sin_cached": full.sin().float()}


def _check_expressible(spec: VitSpec | GptSpec) -> None:
    """Check that the authors' present code has a network with these fields.

    Raises:
        InputError: naming the field that it has not.
    """
    fixed: dict[str, object] = {
        "norm": "layer", "ffn": "gelu", "bias": True, "kv_heads": None, "window": None, "other_layers": "attention",
    }  # fmt: skip
    hybrid = spec.operator != "attention" and "attention" in spec.layer_operators
    if isinstance(spec, VitSpec):
        fixed |= {"class_token": True} | ({"other_rotary": True} if hybrid else {})
        fixed["positions"] = "auto"
        if spec.operator == "attention" and spec.rotary:
            fixed["positions"] = "learned"
    else:
        fixed |= {"tied_embeddings": False} | ({"other_rotary": False, "other_causal": False} if hybrid else {})
        if spec.operator == "alpha":
            fixed["rotary"] = False
    if spec.operator == "alpha" and spec.c1 != spec.c2:
        raise InputError(f"c1: {spec.c1} is not allowed: must equal c2 {spec.c2} in the authors' code")
    for name, value in fixed.items():
        if getattr(spec, name) != value:
            raise InputError(f"{name}: {getattr(spec, name)!r} is not allowed: must be {value!r} in the authors' code")
    if hybrid:
        count = spec.layer_operators.count(spec.operator)
        if spec.layer_operators[:count] != (spec.operator,) * count:
            raise InputError(f"relative_layers: {spec.relative_layers!r} is not allowed: must be the first layers")
