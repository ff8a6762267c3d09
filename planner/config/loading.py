"""Model specs from preset names and files, and back to files."""

from __future__ import annotations

import json
from pathlib import Path

from ..common.errors import InputError
from ..common.files import SPEC_SUFFIXES, read_mapping, write_text
from .model import ModelSpec, parse_model_spec
from .presets import preset


def load_model_spec(name_or_path: str) -> ModelSpec:
    """The spec that a preset name or a YAML or JSON file describes.

    Raises:
        InputError: for an unknown name, an absent or bad file, or a bad field in it.
    """
    path = Path(name_or_path)
    if path.suffix in SPEC_SUFFIXES:
        return parse_model_spec(read_mapping(path), what=str(path))
    return preset(name_or_path)


def dump_model_spec(spec: ModelSpec, suffix: str = ".yaml") -> str:
    """The text of a spec file that `load_model_spec` reads back to the same spec."""
    data = spec.model_dump(mode="json")
    if suffix == ".json":
        return json.dumps(data, indent=2) + "\n"
    import yaml

    return str(yaml.safe_dump(data, sort_keys=False, allow_unicode=True))


def save_model_spec(spec: ModelSpec, path: Path) -> None:
    """Write a spec as YAML or JSON, by the suffix of the path.

    Raises:
        InputError: for another suffix, or a folder that cannot be written.
    """
    if path.suffix not in SPEC_SUFFIXES:
        raise InputError(f"{path}: suffix {path.suffix!r} is not allowed: must be one of {', '.join(SPEC_SUFFIXES)}")
    write_text(path, dump_model_spec(spec, path.suffix))
