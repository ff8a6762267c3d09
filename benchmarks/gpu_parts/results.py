"""What a part has found so far: written to its file at every change, so that a part that is ended loses nothing."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from translution.planner.common import write_text


def finite(value: Any) -> Any:
    """Return JSON data with None instead of numbers that JSON has no form for."""
    if isinstance(value, dict):
        return {str(key): finite(own) for key, own in value.items()}
    if isinstance(value, list | tuple):
        return [finite(own) for own in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: Path, document: dict[str, Any]) -> None:
    """Write a JSON document atomically."""
    write_text(path, json.dumps(finite(document), indent=1, ensure_ascii=False) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Return the document of a file, or an empty one if there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


class Result:
    """The findings of one part.

    Args:
        path: JSON file of the part.
        name: name of the part.
    """

    def __init__(self, path: Path, name: str) -> None:
        self._path = path
        self.data: dict[str, Any] = {}
        """Findings by name; see `put` and `add`."""
        self._document: dict[str, Any] = {"name": name, "state": "running", "line": "", "data": self.data}

    def put(self, **values: Any) -> None:
        """Store values, and write the file."""
        self.data |= values
        write_json(self._path, self._document)

    def add(self, name: str, row: dict[str, Any]) -> None:
        """Append a row to a list of findings, and write the file."""
        self.put(**{name: [*self.data.get(name, []), row]})

    def say(self, line: str) -> None:
        """Set the key figures, one short line, and write the file."""
        self._document["line"] = line
        self.put()

    def note(self, text: str) -> None:
        """Print a line of progress; the last ones are recorded if the part fails."""
        print(text, flush=True)
