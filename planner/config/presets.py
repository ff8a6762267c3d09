"""Presets: ``vit-base/16``, ``gpt-base/1024``, and the paper's names ``ViT-A/56`` and ``GPT-A-160``."""

from __future__ import annotations

import re
from typing import NamedTuple

from ..common.errors import InputError, nearest
from .model import ModelSpec, parse_model_spec


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

PRESET_NAMES: tuple[str, ...] = tuple(f"vit-{size}/{patch}" for size in SIZES for patch in (56, 32, 16)) + tuple(
    f"gpt-{size}/{context}" for size in SIZES for context in (160, 256, 1024)
)


def preset_name(name: str) -> str | None:
    """Return the canonical name (``ViT-A/56`` → ``vit-tiny/56``), or None if there is no such preset."""
    match = re.fullmatch(r"(vit|gpt)-([a-z]+)[/-](\d{1,7})", name.strip().lower(), re.ASCII)
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
            f"model: {name[:60]!r} is not allowed: must be a YAML or JSON file or a preset such as "
            f"vit-base/16 or gpt-base/1024 with size {', '.join(SIZES)}{close}"
        )
    family, _, rest = plain.partition("-")
    size, _, number = rest.partition("/")
    sizes = SIZES[size]._asdict()
    if family == "vit":
        own: dict[str, object] = {"image": IMAGE, "patch": int(number), "classes": CLASSES}
    else:
        own = {"context": int(number), "vocabulary": VOCABULARY}
    return parse_model_spec({"family": family, "name": plain, **sizes, **own}, what=plain)
