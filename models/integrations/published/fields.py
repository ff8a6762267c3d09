"""Finds the spec of a network in the keys and shapes of its state dict, and in the name of its preset.

Source: the modules of github.com/hehefan/Translution at 13730aa and before, and their presets.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from translution.planner.common import InputError

_SIZE = re.compile(r"_(tiny|mini|small|base|large)$")
_PRESET_HEADS = {192: 3, 384: 6, 768: 12, 1024: 16}
"""Heads of the presets by model width."""
_PRESET_CHANNELS = 3
_LAYER = re.compile(r"(?P<trunk>translution|transformer)\.layers\.(?P<number>\d+)\.0\.(?P<rest>.+)")


class Layer(NamedTuple):
    """What the keys of one layer tell."""

    operator: str
    """attention, translution or alpha."""
    roles: str
    """Roles with a table."""
    turned: bool
    """Whether the layer has caches of a rotary embedding."""
    causal: bool
    """Whether the layer has a causal mask."""


class FoundFields(NamedTuple):
    """What a state dict tells of its network."""

    trunk: str
    """translution or transformer: what the keys of the layers begin with."""
    spec: dict[str, Any]
    """Fields of a model spec."""


def find_fields(tensors: Mapping[str, Tensor], arch: str | None, given: Mapping[str, Any]) -> FoundFields:
    """Return the fields of a spec that a state dict, a preset and the caller tell.

    Args:
        tensors: state dict with the authors' keys.
        arch: name of the network in the authors' code, if known.
        given: fields of the spec from the caller.

    Raises:
        InputError: naming a field that is required, or that contradicts the file, or a key that is missing.
    """
    family = "vit" if "cls_token" in tensors else "gpt" if "wte.weight" in tensors else None
    if family is None:
        raise InputError(
            "the file has neither cls_token nor wte.weight: it must hold a ViT or GPT of the authors' code"
        )
    trunk, layers = _find_layers(tensors)
    first = f"{trunk}.layers.0"
    preset = bool(arch and _SIZE.search(arch))
    dim = _shape(tensors, f"{trunk}.norm.weight")[0]
    found: dict[str, Any] = {"family": family, "dim": dim, "depth": len(layers)}
    found["ffn_dim"] = _shape(tensors, f"{first}.1.net.1.weight")[0]
    found |= _operator_fields(layers, family)
    inner = _inner_dim(tensors, f"{first}.0", layers[0])
    found["heads"] = _heads(tensors, first, dim, inner, preset=preset, given=given)
    if inner % found["heads"]:
        raise InputError(f"heads: {found['heads']} is not allowed: must divide the file's inner width {inner}")
    found["head_dim"] = inner // found["heads"]
    if layers[0].operator == "alpha":
        found |= _low_widths(tensors, f"{first}.0", layers[0].roles, found["heads"])
    if family == "gpt":
        found |= _gpt_fields(tensors, f"{first}.0", layers[0])
        learned = "wpe.weight" in tensors
    else:
        found |= _vit_fields(tensors, f"{first}.0", preset=preset, given=given)
        learned = "pos_embedding" in tensors
    expected = found["operator"] == "attention" and not found.get("rotary", False)
    if learned != expected:
        found["positions"] = "learned" if learned else "none"
    return FoundFields(trunk, _joined(found, given))


def _joined(found: dict[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Join what was found and what was given.

    Raises:
        InputError: for a field that contradicts the file.
    """
    for name, value in given.items():
        told = found.get(name)
        if name in found and told != value and told != (value, value):
            raise InputError(f"{name}: {value!r} is not allowed: the file has {told!r}")
    return dict(given) | found


def _shape(tensors: Mapping[str, Tensor], key: str) -> tuple[int, ...]:
    if key not in tensors:
        raise InputError(f"{key} is missing in the file")
    return tuple(tensors[key].shape)


def _find_layers(tensors: Mapping[str, Tensor]) -> tuple[str, list[Layer]]:
    """Return what the keys of the layers begin with, and every layer."""
    names: dict[int, set[str]] = {}
    trunks = set()
    for key in tensors:
        if match := _LAYER.fullmatch(key):
            trunks.add(match["trunk"])
            names.setdefault(int(match["number"]), set()).add(match["rest"])
    if len(trunks) != 1:
        raise InputError("the file has no layers: keys translution.layers.0 or transformer.layers.0 are missing")
    if set(names) != set(range(len(names))):
        missing = min(set(range(max(names))) - set(names))
        raise InputError(f"{trunks.pop()}.layers.{missing} is missing in the file")
    return trunks.pop(), [_find_layer(number, names[number]) for number in sorted(names)]


def _find_layer(number: int, names: set[str]) -> Layer:
    full = "".join(role for role in "qkv" if f"to_{role}.unique_params" in names)
    low = "".join(role for role in "qkv" if f"to_{role}2.unique_params" in names)
    turned = any(name.startswith(("rope.", "rotary_emb.")) for name in names)
    if not full and "to_qkv.weight" not in names:
        raise InputError(f"layers.{number}.0.to_qkv.weight is missing in the file")
    operator = "translution" if full else "alpha" if low else "attention"
    return Layer(operator, full or low, turned, "causal" in names)


def _operator_fields(layers: list[Layer], family: str) -> dict[str, Any]:
    """Return operator, roles, rotary and what the other layers of a hybrid are."""
    main = layers[0]
    relative = [number for number, layer in enumerate(layers) if layer.operator != "attention"]
    for number, layer in enumerate(layers):
        if layer.operator != "attention" and (layer.operator, layer.roles) != (main.operator, main.roles):
            raise InputError(f"layers.{number} has tables of {layer.roles}: must be those of layers.0, {main.roles}")
    if main.operator == "attention":
        if relative:
            raise InputError(
                f"layers.{relative[0]} has tables, and layers.0 has none: tables must be in the first layers"
            )
        return {"operator": "attention"} | ({"rotary": True} if main.turned else {})
    fields: dict[str, Any] = {"operator": main.operator, "roles": main.roles}
    if main.operator == "alpha" and main.turned:
        fields["rotary"] = True
    others = [layer for layer in layers if layer.operator == "attention"]
    if others:
        count = len(relative)
        fields["relative_layers"] = f"first:{count}" if relative == list(range(count)) else tuple(relative)
        fields["other_rotary"] = others[0].turned
        if family == "gpt":
            fields["other_causal"] = others[0].causal
    return fields


def _inner_dim(tensors: Mapping[str, Tensor], layer: str, what: Layer) -> int:
    if what.operator == "translution":
        return _shape(tensors, f"{layer}.to_{what.roles[0]}.unique_params")[-1]
    rows, rest = divmod(_shape(tensors, f"{layer}.to_qkv.weight")[0], 3)
    if rest:
        raise InputError(f"{layer}.to_qkv.weight has {3 * rows + rest} rows: must be a multiple of 3")
    return rows


def _heads(
    tensors: Mapping[str, Tensor], first: str, dim: int, inner: int, *, preset: bool, given: Mapping[str, Any]
) -> int:
    if f"{first}.0.to_out.0.weight" not in tensors:
        return 1
    for key, value in tensors.items():
        if key.endswith(".cos_cached"):
            return int(inner // value.shape[-1])
    if preset and dim in _PRESET_HEADS:
        return _PRESET_HEADS[dim]
    heads = given.get("heads")
    if not isinstance(heads, int) or isinstance(heads, bool) or heads < 1:
        raise InputError("heads: is required: the file does not tell the number of attention heads")
    return heads


def _low_widths(tensors: Mapping[str, Tensor], layer: str, roles: str, heads: int) -> dict[str, int]:
    low1, low2 = _shape(tensors, f"{layer}.to_{roles[0]}2.unique_params")[1:]
    if low1 % heads or low2 % heads:
        raise InputError(f"heads: {heads} is not allowed: must divide the file's low widths {low1} and {low2}")
    return {"c1": low1 // heads, "c2": low2 // heads}


def _gpt_fields(tensors: Mapping[str, Tensor], layer: str, what: Layer) -> dict[str, int]:
    key = f"{layer}.causal"
    if key in tensors:
        context = _shape(tensors, key)[-1]
    elif what.roles:
        last = "2" if what.operator == "alpha" else ""
        context = _shape(tensors, f"{layer}.to_{what.roles[0]}{last}.unique_params")[0]
    else:
        context = _shape(tensors, "wpe.weight")[0]
    return {"context": context, "vocabulary": _shape(tensors, "wte.weight")[0]}


def _pair(value: Any) -> tuple[int, int] | None:
    pair = (value, value) if isinstance(value, int) else tuple(value) if isinstance(value, (list, tuple)) else None
    return pair if pair and len(pair) == 2 and all(isinstance(n, int) and n > 0 for n in pair) else None


def _vit_fields(tensors: Mapping[str, Tensor], layer: str, *, preset: bool, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return image, patch, channels and classes."""
    values = _shape(tensors, "to_patch_embedding.1.weight")[0]
    patch, grid = _pair(given.get("patch")), _grid(tensors, layer, square=preset)
    if patch is None and preset:
        side = math.isqrt(values // _PRESET_CHANNELS)
        patch = (side, side)
    if patch is None:
        raise InputError("patch: is required: the file does not tell the height and width of a patch")
    image = _pair(given.get("image"))
    if image is None and grid is not None:
        image = (grid[0] * patch[0], grid[1] * patch[1])
    if image is None:
        raise InputError("image: is required: the file does not tell the height and width of an image")
    channels, rest = divmod(values, patch[0] * patch[1])
    if rest or not channels:
        raise InputError(f"patch: {patch} is not allowed: must divide the file's {values} values per patch")
    own = (image[0] // patch[0], image[1] // patch[1])
    if grid is not None and own != grid:
        raise InputError(f"image: {image} is not allowed: the file has a grid of {grid} patches of {patch}")
    _check_grid(tensors, own)
    return {"image": image, "patch": patch, "channels": channels, "classes": _shape(tensors, "mlp_head.weight")[0]}


def _grid(tensors: Mapping[str, Tensor], layer: str, *, square: bool) -> tuple[int, int] | None:
    """Return the rows and columns of patches, from caches of a rotary embedding, or of a preset's square image."""
    for key, value in tensors.items():
        if key.endswith("rope.cos_cached"):
            return int(value.shape[1]), int(value.shape[2])
    if not square:
        return None
    if "pos_embedding" in tensors:
        side = math.isqrt(_shape(tensors, "pos_embedding")[1] - 1)
        return side, side
    for key, value in tensors.items():
        if key.startswith(layer) and key.endswith(".unique_params"):
            side = (math.isqrt(len(value) - 3) + 1) // 2
            return side, side
    return None


def _check_grid(tensors: Mapping[str, Tensor], grid: tuple[int, int]) -> None:
    relations = (2 * grid[0] - 1) * (2 * grid[1] - 1) + 3
    for key, value in tensors.items():
        if key.endswith(".unique_params") and len(value) != relations:
            raise InputError(
                f"image: a grid of {grid[0]}x{grid[1]} patches is not allowed: has {relations} relations, and the file "
                f"{len(value)} ({key})"
            )
    if "pos_embedding" in tensors and _shape(tensors, "pos_embedding")[1] != grid[0] * grid[1] + 1:
        raise InputError(
            f"image: a grid of {grid[0]}x{grid[1]} patches is not allowed: the file has "
            f"{_shape(tensors, 'pos_embedding')[1] - 1} positions"
        )
