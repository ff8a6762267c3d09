"""The catalog's JSON files, which commands read, are made from the YAML files that people edit."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DATA = ROOT / "planner" / "hardware" / "data"
as_json: Callable[[Path], str] = runpy.run_path(str(ROOT / "scripts" / "catalog_json.py"))["as_json"]


@pytest.mark.parametrize("source", sorted(DATA.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_json_file_is_made_from_the_yaml_file(source: Path) -> None:
    made = source.with_suffix(".json").read_text(encoding="utf-8")
    assert made == as_json(source), "run python scripts/catalog_json.py"


def test_every_json_file_has_a_source() -> None:
    assert [path.stem for path in sorted(DATA.glob("*.json"))] == [path.stem for path in sorted(DATA.glob("*.yaml"))]
