"""Write the catalog's YAML files as JSON too, which a command reads without YAML's 30 ms.

python scripts/catalog_json.py
"""

from __future__ import annotations

import json
from pathlib import Path

import yaml

DATA = Path(__file__).parents[1] / "planner" / "hardware" / "data"


def as_json(path: Path) -> str:
    """Return the content of a YAML file as JSON."""
    return json.dumps(yaml.safe_load(path.read_text(encoding="utf-8")), separators=(",", ":")) + "\n"


if __name__ == "__main__":
    for source in sorted(DATA.glob("*.yaml")):
        source.with_suffix(".json").write_text(as_json(source), encoding="utf-8")
