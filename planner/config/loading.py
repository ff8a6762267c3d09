"""`load_model` reads a model spec from a preset name, a file or a mapping; `save_model` writes it to a file.

Presets are ``vit-base/16``, ``gpt-base/1024``, ``video-base/32`` and so on, and the paper's names such as ``ViT-A/56``
and ``GPT-A-160``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from ..common.errors import InputError, nearest
from ..common.files import SPEC_SUFFIXES, read_json, read_mapping, write_text
from .model import GptSpec, ModelSpec, VideoSpec, VitSpec, override, parse_model_spec
from .model_base import OPERATORS


def load_model(source: ModelSpec | Mapping[str, object] | str | Path, /, **overrides: object) -> ModelSpec:
    """Return a model spec, with some of its fields replaced.

    Args:
        source: a preset name (``"vit-base/16"``), a YAML or JSON file, a network file that ``translution export`` or
            ``import`` wrote, a mapping with a file's content, or a spec.
        overrides: fields of the spec to replace, such as ``operator="alpha"``; None leaves a field as it is.

    Raises:
        InputError: for an unknown name, a missing or damaged file, a bad field, or an override of a field that the
            model's operators do not use.
    """
    spec: ModelSpec
    if isinstance(source, VitSpec | GptSpec | VideoSpec):
        spec = source
    elif isinstance(source, Mapping):
        spec = parse_model_spec(dict(source))
    elif Path(source).suffix in SPEC_SUFFIXES:
        spec = parse_model_spec(read_mapping(Path(source)), what=str(source))
    elif Path(source).suffix == ".safetensors":
        spec = network_spec(Path(source))
    else:
        spec = preset(str(source))
    changed = override(spec, **overrides)
    for name, operators in _USED_BY.items():
        if overrides.get(name) is not None and not set(operators) & set(changed.layer_operators):
            raise InputError(
                f"{name}: {overrides[name]!r} is not allowed with operator {changed.operator!r}, which ignores it: "
                f"must be used with {' or '.join(operators)}"
            )
    return changed


_RELATIVE = tuple(name for name in OPERATORS if name != "attention")
_USED_BY = {
    "c1": ("alpha",),
    "c2": ("alpha",),
    "roles": ("translution", "alpha", "absolute"),
    "relative_layers": _RELATIVE,
}
"""Operators that use a field, for fields that have a value with every operator."""
SPEC_KEY = "model_spec"
"""Metadata key of the model's spec in a network file, stored as JSON."""
_LONGEST_HEADER_BYTES = 100 * 2**20


def network_spec(path: Path) -> ModelSpec:
    """Return the spec of the network in a safetensors file; the tensors are not read.

    Raises:
        InputError: if the file is missing, truncated or in another format, or holds no spec.
    """
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            text = file.read(length) if length <= _LONGEST_HEADER_BYTES else b""
        header = read_json(text, "header")
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (OSError, InputError) as error:
        raise InputError(f"{path}: not a complete safetensors file: {error}") from None
    metadata = header.get("__metadata__") if isinstance(header, dict) else None
    if not isinstance(metadata, dict) or SPEC_KEY not in metadata:
        raise InputError(
            f"{path}: has no {SPEC_KEY!r} in its metadata: must be written by translution export or import"
        )
    what = f"{path}: {SPEC_KEY}"
    return parse_model_spec(read_json(str(metadata[SPEC_KEY]), what), what)


def dump_model(spec: ModelSpec, suffix: str = ".yaml") -> str:
    """Return the text of a spec file that `load_model` reads back to the same spec."""
    data = spec.model_dump(mode="json")
    if suffix == ".json":
        return json.dumps(data, indent=2) + "\n"
    import yaml

    return str(yaml.safe_dump(data, sort_keys=False, allow_unicode=True))


def save_model(spec: ModelSpec, path: Path) -> None:
    """Write a spec as YAML or JSON; the suffix of the path decides.

    Raises:
        InputError: for another suffix, or a folder that cannot be written.
    """
    if path.suffix not in SPEC_SUFFIXES:
        raise InputError(f"{path}: suffix {path.suffix!r} is not allowed: must be one of {', '.join(SPEC_SUFFIXES)}")
    write_text(path, dump_model(spec, path.suffix))


class _Size(NamedTuple):
    dim: int
    depth: int
    heads: int


SIZES: dict[str, _Size] = {
    "tiny": _Size(192, 6, 3),
    "mini": _Size(192, 12, 3),
    "small": _Size(384, 12, 6),
    "base": _Size(768, 12, 12),
    "large": _Size(1024, 24, 16),
}
PAPER_SIZES = {"a": "tiny", "b": "mini", "c": "small"}
"""The paper's size letters; its B is *mini*, not ViT-Base."""

IMAGE, CLASSES, VOCABULARY = 224, 1000, 50257
FRAMES, TUBELET_FRAMES, VIDEO_CLASSES = 16, 2, 400
"""A clip of a video preset: frames, frames per tubelet, and the classes of Kinetics-400."""

PRESET_NAMES: tuple[str, ...] = (
    *(f"vit-{size}/{patch}" for size in SIZES for patch in (56, 32, 16)),
    *(f"gpt-{size}/{context}" for size in SIZES for context in (160, 256, 1024)),
    *(f"video-{size}/{patch}" for size in SIZES for patch in (56, 32)),
)


def preset_name(name: str) -> str | None:
    """Return the canonical name (``ViT-A/56`` → ``vit-tiny/56``), or None if there is no such preset."""
    match = re.fullmatch(r"(vit|gpt|video)-([a-z]+)[/-](\d{1,7})", name.strip().lower(), re.ASCII)
    if not match:
        return None
    family, size, number = match.groups()
    size = PAPER_SIZES.get(size, size)
    if size not in SIZES or int(number) < 1:
        return None
    return f"{family}-{size}/{int(number)}"


def preset(name: str) -> ModelSpec:
    """Return the spec of a preset: full Translution with roles qkv.

    Any patch size that divides 224 and any context length is allowed.

    Raises:
        InputError: for an unknown name, or a patch size that does not divide the image.
    """
    plain = preset_name(name)
    if plain is None:
        close = nearest(name.lower(), PRESET_NAMES)
        raise InputError(
            f"model: {name[:60]!r} is not allowed: must be a YAML, JSON or network file, or a preset such as "
            f"vit-base/16 or gpt-base/1024 with size {', '.join(SIZES)}{close}"
        )
    family, _, rest = plain.partition("-")
    size, _, number = rest.partition("/")
    sizes = SIZES[size]._asdict()
    if family == "vit":
        own: dict[str, object] = {"image": IMAGE, "patch": int(number), "classes": CLASSES}
    elif family == "video":
        tubelet = (TUBELET_FRAMES, int(number), int(number))
        own = {"frames": FRAMES, "image": IMAGE, "tubelet": tubelet, "classes": VIDEO_CLASSES}
    else:
        own = {"context": int(number), "vocabulary": VOCABULARY}
    return parse_model_spec({"family": family, "name": plain, **sizes, **own}, what=plain)
