"""The manifest of a checkpoint. It is written last, so a checkpoint that has one is complete."""

from __future__ import annotations

import re
from pathlib import Path

from pydantic import TypeAdapter

from translution.planner.common import InputError, Schema, parse_json, write_text
from translution.planner.plans import PLAN_FILE, Plan, load_plan

MANIFEST = "manifest.json"
_TAG = re.compile(r"step_(\d+)")


class EvaluationResult(Schema):
    """Means over the evaluated held-out samples."""

    samples: int
    """Number of samples."""
    loss: float
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


class Manifest(Schema):
    """Content of a complete checkpoint."""

    step: int
    """Number of optimizer steps done."""
    ranks: int
    """Number of ranks that saved it."""
    files: dict[str, int]
    """Size of every file in bytes, by its path within the checkpoint."""
    evaluation: EvaluationResult | None = None
    """Result of the evaluation after the same step; null if there was none."""

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
    other = (
        f"remove {folder / known[-1]} to resume from {known[-2]}"
        if len(known) > 1
        else "there is no other complete one"
    )
    return _checked(folder, known[-1], other)


def best_checkpoint(folder: Path) -> CheckpointRef | None:
    """Find the complete checkpoint with the best evaluation and check its files; None if none was evaluated.

    Raises:
        InputError: if a file is missing or its size differs from the manifest.
    """
    tag = best_tag(folder)
    return None if tag is None else _checked(folder, tag, "export another one")


def best_tag(folder: Path) -> str | None:
    """Name of the checkpoint with the best evaluation, of equal ones the oldest; None if none was evaluated."""
    best: tuple[str, EvaluationResult] | None = None
    for tag in checkpoint_tags(folder):
        result = _read(folder, tag).evaluation
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
    write_text(folder / tag / MANIFEST, manifest.model_dump_json(indent=2) + "\n")


def _read(folder: Path, tag: str) -> Manifest:
    path = folder / tag / MANIFEST
    return parse_json(_MANIFEST, path.read_bytes(), str(path))


def _checked(folder: Path, tag: str, advice: str) -> CheckpointRef:
    """Return a checkpoint whose files have the sizes of its manifest."""
    manifest = _read(folder, tag)
    for name, size in manifest.files.items():
        file = folder / tag / name
        found = f"{file.stat().st_size} bytes" if file.is_file() else "nothing"
        if found != f"{size} bytes":
            raise InputError(f"{file}: holds {found} and must hold {size} bytes: the checkpoint is damaged; {advice}")
    return CheckpointRef(folder=folder, tag=tag, manifest=manifest)
