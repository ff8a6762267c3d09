"""Chooses the run to resume, and checks that a plan can resume it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from translution.planner.common import InputError, write_text
from translution.planner.plans import PLAN_FILE, RUNS, Plan

from ..runs.folder import CHECKPOINT, require_run
from ..runs.measurement import remove_measurements
from .manifest import CheckpointRef, checkpoint_tags, newest_checkpoint, saved_unix_s

_CHANGEABLE = {
    "training": {
        "steps",
        "checkpoint_steps",
        "checkpoint_minutes",
        "keep_checkpoints",
        "keep_best",
        "final_checkpoint",
        "micro_batch",
        "accumulation",
        "evaluation_data",
        "corrupt_limit",
        "evaluation_steps",
        "evaluation_samples",
        "evaluation_crop",
        "monitor",
    },
    "model": {"checkpointing"},
}
"""Fields that may differ: they do not change the training as long as each step uses the same samples."""


def _differences(section: str, asked: Mapping[str, object], had: Mapping[str, object]) -> Iterator[str]:
    for name, value in asked.items():
        if name not in _CHANGEABLE.get(section, ()) and value != had.get(name):
            yield f"{section}.{name}: {value!r} is not allowed: must be {had.get(name)!r}, as in the run to resume"


def check_same_training(plan: Plan, before: Plan) -> None:
    """Check that a plan continues the training of an earlier plan; the number of ranks may differ.

    Raises:
        InputError: names the first field that must not differ.
    """
    if plan.model.family != before.model.family:
        raise InputError(f"model.family: {plan.model.family!r} is not allowed: must be {before.model.family!r}")
    for section in ("model", "training"):
        asked, had = (getattr(which, section).model_dump() for which in (plan, before))
        for text in _differences(section, asked, had):
            raise InputError(text)
    training, ranks = plan.training, plan.cluster.world_size
    batch, batch_before = training.global_batch(ranks), before.training.global_batch(before.cluster.world_size)
    if batch != batch_before:
        raise InputError(
            f"global batch: {batch} (micro-batch {training.micro_batch} x accumulation "
            f"{training.gradient_accumulation_steps} x ranks {ranks}) is not allowed: must be {batch_before}, "
            "as in the run to resume"
        )


def layout_changes(plan: Plan, before: Plan) -> list[str]:
    """Describe each field of a plan that changes the layout of a checkpoint; empty if the layouts are equal."""
    changes = []
    if plan.cluster.world_size != before.cluster.world_size:
        changes.append(f"from {_count_ranks(before)} to {plan.cluster.world_size}")
    if plan.parallel != before.parallel:
        changes.append(f"from parallel.relation {before.parallel.relation} to {plan.parallel.relation}")
    if plan.tile_relations != before.tile_relations:
        changes.append(f"from tile_relations {before.tile_relations} to {plan.tile_relations}")
    asked, had = dict(_flatten("zero", plan.zero.model_dump())), dict(_flatten("zero", before.zero.model_dump()))
    changes += [f"from {name} {had[name]} to {asked[name]}" for name in asked if asked[name] != had[name]]
    return changes


def _count_ranks(plan: Plan) -> str:
    ranks = plan.cluster.world_size
    return f"{ranks} rank{'' if ranks == 1 else 's'}"


def _flatten(name: str, value: object) -> Iterator[tuple[str, object]]:
    if isinstance(value, Mapping):
        for key, entry in value.items():
            yield from _flatten(f"{name}.{key}", entry)
    else:
        yield name, value


def describe_resharding(plan: Plan, ref: CheckpointRef) -> str:
    """Describe how a checkpoint is resharded for a plan; empty if its layout stays the same."""
    changes = layout_changes(plan, ref.plan())
    if not changes:
        return ""
    more = f" (and {len(changes) - 1} more)" if len(changes) > 1 else ""
    return f"resharding step {ref.manifest.step} {changes[0]}{more}"


def find_resumable(plan: Plan, plan_folder: Path, run: Path | None) -> tuple[Path, CheckpointRef]:
    """Find the run folder to resume and its newest checkpoint.

    Args:
        plan: the plan of the plan folder.
        plan_folder: the plan folder.
        run: the run folder; None takes the plan folder's newest run with a checkpoint.

    Raises:
        InputError: if there is no checkpoint, or the plan cannot resume it.
    """
    if run is None:
        known = sorted(
            (path for path in (plan_folder / RUNS).glob("*") if checkpoint_tags(path / CHECKPOINT)), key=_last_saved
        )
        if not known:
            raise InputError(f"{plan_folder / RUNS}: holds no run with a complete checkpoint to resume")
        run = known[-1]
    return run, check_resumable(plan, run)


def _last_saved(run: Path) -> float:
    """Time at which a run saved its newest checkpoint, by the checkpoint's own record: copies have later files."""
    folder = run / CHECKPOINT
    return saved_unix_s(folder, checkpoint_tags(folder)[-1])


def prepare_resume(plan: Plan, plan_folder: Path, run: Path, ref: CheckpointRef) -> None:
    """Copy the plan into the run that `find_resumable` has found; measurements of another layout are removed."""
    if layout_changes(plan, ref.plan()):
        remove_measurements(run)
    write_text(run / PLAN_FILE, (plan_folder / PLAN_FILE).read_text(encoding="utf-8"))


def check_resumable(plan: Plan, run: Path) -> CheckpointRef:
    """Return the newest checkpoint of a run if a plan can resume it.

    Raises:
        InputError: if there is no checkpoint, it is damaged, the training differs, or all steps are done.
    """
    ref = newest_checkpoint(require_run(run) / CHECKPOINT)
    if ref is None:
        raise InputError(f"{run / CHECKPOINT}: holds no complete checkpoint to resume")
    check_same_training(plan, ref.plan())
    if ref.manifest.step >= plan.training.steps:
        raise InputError(
            f"steps: {plan.training.steps} is not allowed: must be above {ref.manifest.step}, which {run} has done"
        )
    return ref
