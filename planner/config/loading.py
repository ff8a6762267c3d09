"""`load_model` reads a model spec from a preset name, a file or a mapping; `save_model` writes it back to a file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from ..common.errors import InputError
from ..common.files import SPEC_SUFFIXES, read_mapping, write_text
from .model import GptSpec, ModelSpec, VitSpec, override, parse_model_spec
from .presets import preset


def load_model(source: ModelSpec | Mapping[str, object] | str | Path, /, **overrides: object) -> ModelSpec:
    """Return a model spec, with some of its fields replaced.

    Args:
        source: a preset name (``"vit-base/16"``), a YAML or JSON file, a mapping with the file's content, or a spec.
        overrides: fields of the spec to replace, such as ``operator="alpha"``; None leaves a field as it is.

    Raises:
        InputError: for an unknown name, a missing or damaged file, or a bad field.
    """
    spec: ModelSpec
    if isinstance(source, VitSpec | GptSpec):
        spec = source
    elif isinstance(source, Mapping):
        spec = parse_model_spec(dict(source))
    elif Path(source).suffix in SPEC_SUFFIXES:
        spec = parse_model_spec(read_mapping(Path(source)), what=str(source))
    else:
        spec = preset(str(source))
    return override(spec, **overrides)


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
