"""The manifest of a checkpoint. It is written last, so a checkpoint that has one is complete."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import NamedTuple

from pydantic import ConfigDict, Field, TypeAdapter

from translution.planner.common import InputError, Schema, parse_json, write_text
from translution.planner.plans import PLAN_FILE, Plan, load_plan

from ..runs.folder import CHECKPOINT, find_run

MANIFEST = "manifest.json"
_TAG = re.compile(r"step_(\d+)")


class EvaluationResult(Schema):
    """Means over the evaluated held-out samples."""

    # The loss of a model that has diverged is a result too, and must survive being stored.
    model_config = ConfigDict(ser_json_inf_nan="strings")

    samples: int
    """Number of samples."""
    loss: float = Field(allow_inf_nan=True)
    accuracy: float
    """Fraction of predictions whose most likely class or token is right."""
    top5_accuracy: float | None = None
    """Fraction of predictions with the right class among the five most likely; null for at most five classes, and for
    language models."""
    perplexity: float | None = None
    """Exponential of the loss; null for models of images, and above the largest float."""

    def is_better(self, other: EvaluationResult) -> bool:
        """Return True if the accuracy is higher, or, of language models, the loss lower. Losses may be NaN."""
        if self.perplexity is not None or other.perplexity is not None:
            return self.loss < other.loss or (other.loss != other.loss and self.loss == self.loss)
        return self.accuracy > other.accuracy


class FileRecord(NamedTuple):
    """A file of a checkpoint."""

    size_bytes: int
    crc32: str
    """CRC-32 of the content as eight hexadecimal digits."""


class Manifest(Schema):
    """Content of a complete checkpoint."""

    model_config = ConfigDict(ser_json_inf_nan="strings")

    step: int
    """Number of optimizer steps done."""
    ranks: int
    """Number of ranks that saved it."""
    files: dict[str, int]
    """Size of every file in bytes, by its path within the checkpoint."""
    checksums: dict[str, str] = Field(default_factory=dict)
    """CRC-32 of every file as eight hexadecimal digits, by its path; empty in checkpoints of earlier versions."""
    saved_unix_s: float | None = None
    """Time at which it was complete, in seconds since 1970; null in checkpoints of earlier versions."""
    data: str | None = None
    """Fingerprint of the training data; null in checkpoints of earlier versions."""
    evaluation: EvaluationResult | None = None
    """Result of the evaluation after the same step; null if there was none."""
    digest: str | None = None
    """Checksum of all other fields; null in checkpoints of earlier versions."""

    def signed(self) -> Manifest:
        """Return the manifest with the digest of its other fields."""
        return self.model_copy(update={"digest": self._digest()})

    @property
    def is_intact(self) -> bool:
        """Whether the digest is that of the other fields, or there is none."""
        return self.digest is None or self.digest == self._digest()

    def _digest(self) -> str:
        return hashlib.sha256(self.model_dump_json(exclude={"digest"}).encode()).hexdigest()

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
    return _checked(folder, known[-1])


def run_checkpoints(run: Path) -> list[CheckpointRef]:
    """Return all complete checkpoints of a run, the oldest first, after checking their manifests and files' sizes.

    Args:
        run: the run folder, or a plan folder whose newest run is used.

    Raises:
        InputError: if the folder is neither, holds no complete checkpoint, or one is damaged.
    """
    folder = find_run(run) / CHECKPOINT
    found = [_checked(folder, tag) for tag in checkpoint_tags(folder)]
    if not found:
        raise InputError(f"{folder}: holds no complete checkpoint")
    return found


def best_checkpoint(folder: Path) -> CheckpointRef | None:
    """Find the complete checkpoint with the best evaluation and check its files; None if none was evaluated.

    Raises:
        InputError: if a file is missing or its size differs from the manifest.
    """
    tag = best_tag(folder)
    return None if tag is None else _checked(folder, tag)


def best_tag(folder: Path) -> str | None:
    """Name of the checkpoint with the best evaluation, of equal ones the oldest; None if none was evaluated."""
    best: tuple[str, EvaluationResult] | None = None
    for tag in checkpoint_tags(folder):
        try:
            result = _read(folder, tag).evaluation
        except InputError:
            continue  # A damaged checkpoint is reported when somebody asks for it.
        if result is not None and (best is None or result.is_better(best[1])):
            best = tag, result
    return None if best is None else best[0]


def is_best(folder: Path, result: EvaluationResult) -> bool:
    """Return True if a result is better than that of every complete checkpoint."""
    tag = best_tag(folder)
    before = None if tag is None else _read(folder, tag).evaluation
    return before is None or result.is_better(before)


def write_evaluation(folder: Path, tag: str, result: EvaluationResult) -> None:
    """Add the result of an evaluation to the manifest of a complete checkpoint."""
    manifest = _read(folder, tag).model_copy(update={"evaluation": result})
    write_manifest(folder / tag, manifest)


def write_manifest(path: Path, manifest: Manifest) -> None:
    """Write the manifest into the folder of a checkpoint, durably."""
    write_text(path / MANIFEST, manifest.signed().model_dump_json(indent=2) + "\n", durable=True)


def _read(folder: Path, tag: str) -> Manifest:
    path = folder / tag / MANIFEST
    try:
        manifest = parse_json(_MANIFEST, path.read_bytes(), str(path))
    except (InputError, OSError) as error:
        raise damage(folder, tag, str(error)) from None
    if not manifest.is_intact:
        raise damage(folder, tag, f"{path}: its content is not what was saved")
    if tag != f"step_{manifest.step}":
        raise damage(folder, tag, f"{path}: is that of step {manifest.step}")
    return manifest


def saved_unix_s(folder: Path, tag: str) -> float:
    """Return the time at which a checkpoint was saved; the time of its files if its record is damaged or has none."""
    try:
        recorded = _read(folder, tag).saved_unix_s
    except InputError:
        recorded = None
    return (folder / tag).stat().st_mtime if recorded is None else recorded


def damage(folder: Path, tag: str, what: str) -> InputError:
    """Return the error for a damaged checkpoint, with what to resume from instead."""
    others = [other for other in checkpoint_tags(folder) if other != tag]
    advice = f"remove {folder / tag} to resume from {others[-1]}" if others else "there is no other complete one"
    return InputError(f"{what}: the checkpoint is damaged; {advice}")


def _checked(folder: Path, tag: str) -> CheckpointRef:
    """Return a checkpoint whose files have the sizes of its manifest."""
    manifest = _read(folder, tag)
    for name, size in manifest.files.items():
        file = folder / tag / name
        found = f"{file.stat().st_size} bytes" if file.is_file() else "nothing"
        if found != f"{size} bytes":
            raise damage(folder, tag, f"{file}: holds {found} and must hold {size} bytes")
    return CheckpointRef(folder=folder, tag=tag, manifest=manifest)
