"""What tells a whole checkpoint from a part of one: its manifest, written last."""

from __future__ import annotations

import re
from pathlib import Path

from pydantic import TypeAdapter

from translution.planner.common.errors import InputError
from translution.planner.common.schema import Schema, parse_json
from translution.planner.plans.plan import PLAN_FILE, Plan, load_plan

MANIFEST = "manifest.json"
_TAG = re.compile(r"step_(\d+)")


class Manifest(Schema):
    """What a whole checkpoint holds."""

    step: int
    """Optimizer steps done."""
    ranks: int
    files: dict[str, int]
    """Bytes of every file, by its path within the checkpoint."""


class Saved(Schema):
    """A whole checkpoint."""

    folder: Path
    """The run's checkpoint folder."""
    tag: str
    manifest: Manifest

    def plan(self) -> Plan:
        """How it was saved.

        Raises:
            InputError: if no plan is there.
        """
        own = self.folder / self.tag
        # Before checkpoints held their plan, a run could not go on with another layout.
        return load_plan(own if (own / PLAN_FILE).is_file() else self.folder.parent)


_MANIFEST: TypeAdapter[Manifest] = TypeAdapter(Manifest)


def tags(folder: Path) -> list[str]:
    """Names of the checkpoints that were saved whole, the oldest first."""
    found = [path.name for path in folder.glob("step_*") if _TAG.fullmatch(path.name) and (path / MANIFEST).is_file()]
    return sorted(found, key=lambda tag: int(tag.partition("_")[2]))


def newest(folder: Path) -> Saved | None:
    """The newest checkpoint, its files looked at; None if there is none.

    Raises:
        InputError: if a file is missing or has another size than when it was saved.
    """
    known = tags(folder)
    if not known:
        return None
    path = folder / known[-1]
    manifest = parse_json(_MANIFEST, (path / MANIFEST).read_bytes(), str(path / MANIFEST))
    for name, size in manifest.files.items():
        file = path / name
        found = f"{file.stat().st_size} bytes" if file.is_file() else "nothing"
        if found != f"{size} bytes":
            before = f"remove {path} to resume from {known[-2]}" if len(known) > 1 else "no other is whole"
            raise InputError(f"{file}: holds {found} and must hold {size} bytes: the checkpoint is damaged; {before}")
    return Saved(folder=folder, tag=known[-1], manifest=manifest)
