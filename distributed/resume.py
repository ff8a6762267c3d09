"""Which run is resumed, and whether a plan may go on with it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from translution.planner.errors import InputError
from translution.planner.files import write_text
from translution.planner.plan import PLAN_FILE, Plan, load_plan

from .manifest import Saved, newest, tags
from .run_files import CHECKPOINT, RUNS, require_run

_FREE = {
    "training": {
        "steps",
        "checkpoint_steps",
        "checkpoint_minutes",
        "keep_checkpoints",
        "evaluation_data",
        "corrupt_limit",
        "evaluation_steps",
        "evaluation_samples",
        "monitor",
    },
    "model": {"checkpointing"},
}
"""Fields that may differ: they change neither a value nor where it lies."""


def _differences(section: str, asked: Mapping[str, object], had: Mapping[str, object]) -> Iterator[str]:
    for name, value in asked.items():
        if name not in _FREE.get(section, ()) and value != had.get(name):
            yield f"{section}.{name}: {value!r} is not allowed: must be {had.get(name)!r}, as in the run to resume"


def check_same(plan: Plan, before: Plan) -> None:
    """Whether a plan goes on exactly where another stopped.

    Raises:
        InputError: naming the first field that must not differ.
    """
    if plan.model.family != before.model.family:
        raise InputError(f"model.family: {plan.model.family!r} is not allowed: must be {before.model.family!r}")
    sections: dict[str, tuple[Mapping[str, object], Mapping[str, object]]] = {
        "cluster": ({"ranks": plan.cluster.ranks}, {"ranks": before.cluster.ranks})
    }
    sections |= {
        name: (getattr(plan, name).model_dump(), getattr(before, name).model_dump())
        for name in ("model", "training", "zero")
    }
    sections["plan"] = {"tile_relations": plan.tile_relations}, {"tile_relations": before.tile_relations}
    for section, (asked, had) in sections.items():
        for text in _differences(section, asked, had):
            raise InputError(text)


def find_resumable(plan: Plan, plan_folder: Path, run: Path | None) -> tuple[Path, Saved]:
    """The run folder to go on with, and its newest checkpoint.

    Args:
        plan: of the plan folder.
        plan_folder: whose newest run with a checkpoint is taken,
        run: unless it is this one.

    Raises:
        InputError: if there is none, or the plan may not go on with it.
    """
    if run is None:
        known = sorted(
            (path for path in (plan_folder / RUNS).glob("*") if tags(path / CHECKPOINT)),
            key=lambda path: (path / CHECKPOINT).stat().st_mtime_ns,
        )
        if not known:
            raise InputError(f"{plan_folder / RUNS}: holds no run with a whole checkpoint to resume")
        run = known[-1]
    return run, check_resumable(plan, run)


def run_to_resume(plan: Plan, plan_folder: Path, run: Path | None) -> tuple[Path, Saved]:
    """As `find_resumable`; the run takes the plan over."""
    run, saved = find_resumable(plan, plan_folder, run)
    write_text(run / PLAN_FILE, (plan_folder / PLAN_FILE).read_text(encoding="utf-8"))
    return run, saved


def check_resumable(plan: Plan, run: Path) -> Saved:
    """The newest checkpoint of a run, if a plan may go on with it.

    Raises:
        InputError: if there is none, it is damaged, the plan differs, or nothing is left to do.
    """
    saved = newest(require_run(run) / CHECKPOINT)
    if saved is None:
        raise InputError(f"{run / CHECKPOINT}: holds no whole checkpoint to resume")
    check_same(plan, load_plan(run))
    if saved.manifest.step >= plan.training.steps:
        raise InputError(
            f"steps: {plan.training.steps} is not allowed: must be above {saved.manifest.step}, which {run} has done"
        )
    return saved
