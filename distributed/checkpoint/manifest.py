"""The manifest of a checkpoint. It is written last, so a checkpoint that has one is complete."""

from __future__ import annotations

import re
from pathlib import Path

from pydantic import TypeAdapter

from translution.planner.common import InputError, Schema, parse_json
from translution.planner.plans import PLAN_FILE, Plan, load_plan

MANIFEST = "manifest.json"
_TAG = re.compile(r"step_(\d+)")


class Manifest(Schema):
    """Content of a complete checkpoint."""

    step: int
    """Number of optimizer steps done."""
    ranks: int
    """Number of ranks that saved it."""
    files: dict[str, int]
    """Size of every file in bytes, by its path within the checkpoint."""

    @property
    def total_bytes(self) -> int:
        """Bytes of all files."""
        return sum(self.files.values())


class CheckpointRef(Schema):
    """Names a complete checkpoint of a run."""

    folder: Path
    """The run's checkpoint folder."""
    tag: str
    """Name of the checkpoint's folder in it, ``step_N``."""
    manifest: Manifest

    def plan(self) -> Plan:
        """Load the plan with which the checkpoint was saved.

        Raises:
            InputError: if there is no plan.
        """
        # Older checkpoints hold no plan; their run could only be resumed with its own plan.
        return load_plan(self.path if (self.path / PLAN_FILE).is_file() else self.folder.parent)

    @property
    def path(self) -> Path:
        """Folder of the checkpoint itself."""
        return self.folder / self.tag


_MANIFEST: TypeAdapter[Manifest] = TypeAdapter(Manifest)


def checkpoint_tags(folder: Path) -> list[str]:
    """Names of the complete checkpoints in a run's checkpoint folder, the oldest first."""
    found = [path.name for path in folder.glob("step_*") if _TAG.fullmatch(path.name) and (path / MANIFEST).is_file()]
    return sorted(found, key=lambda tag: int(tag.partition("_")[2]))


def newest_checkpoint(folder: Path) -> CheckpointRef | None:
    """Find the newest complete checkpoint and check its files; None if there is none.

    Raises:
        InputError: if a file is missing or its size differs from the manifest.
    """
    known = checkpoint_tags(folder)
    if not known:
        return None
    path = folder / known[-1]
    manifest = parse_json(_MANIFEST, (path / MANIFEST).read_bytes(), str(path / MANIFEST))
    for name, size in manifest.files.items():
        file = path / name
        found = f"{file.stat().st_size} bytes" if file.is_file() else "nothing"
        if found != f"{size} bytes":
            before = f"remove {path} to resume from {known[-2]}" if len(known) > 1 else "there is no other complete one"
            raise InputError(f"{file}: holds {found} and must hold {size} bytes: the checkpoint is damaged; {before}")
    return CheckpointRef(folder=folder, tag=known[-1], manifest=manifest)
