"""Which run is resumed, and whether a plan may go on with it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from translution.planner.common.errors import InputError
from translution.planner.common.files import write_text
from translution.planner.plans.plan import PLAN_FILE, Plan

from ..runs.folder import CHECKPOINT, RUNS, require_run
from ..runs.measurement import remove_measurements
from .manifest import Saved, newest, tags

_FREE = {
    "training": {
        "steps",
        "checkpoint_steps",
        "checkpoint_minutes",
        "keep_checkpoints",
        "micro_batch",
        "accumulation",
        "evaluation_data",
        "corrupt_limit",
        "evaluation_steps",
        "evaluation_samples",
        "monitor",
    },
    "model": {"checkpointing"},
}
"""Fields that may differ: they change no value, as long as a step takes the same samples."""


def _differences(section: str, asked: Mapping[str, object], had: Mapping[str, object]) -> Iterator[str]:
    for name, value in asked.items():
        if name not in _FREE.get(section, ()) and value != had.get(name):
            yield f"{section}.{name}: {value!r} is not allowed: must be {had.get(name)!r}, as in the run to resume"


def check_same(plan: Plan, before: Plan) -> None:
    """Whether a plan goes on with the same training where another stopped, on whatever ranks.

    Raises:
        InputError: naming the first field that must not differ.
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
    """What lies elsewhere than in a checkpoint: a phrase for each field that differs; none if nothing does."""
    changes = []
    if plan.cluster.world_size != before.cluster.world_size:
        changes.append(f"from {_ranks(before)} to {plan.cluster.world_size}")
    if plan.tile_relations != before.tile_relations:
        changes.append(f"from tile_relations {before.tile_relations} to {plan.tile_relations}")
    asked, had = dict(_flat("zero", plan.zero.model_dump())), dict(_flat("zero", before.zero.model_dump()))
    changes += [f"from {name} {had[name]} to {asked[name]}" for name in asked if asked[name] != had[name]]
    return changes


def _ranks(plan: Plan) -> str:
    ranks = plan.cluster.world_size
    return f"{ranks} rank{'' if ranks == 1 else 's'}"


def _flat(name: str, value: object) -> Iterator[tuple[str, object]]:
    if isinstance(value, Mapping):
        for key, entry in value.items():
            yield from _flat(f"{name}.{key}", entry)
    else:
        yield name, value


def reshard_text(plan: Plan, saved: Saved) -> str:
    """What reading a checkpoint under a plan takes beyond copying; nothing for the layout it was saved with."""
    changes = layout_changes(plan, saved.plan())
    if not changes:
        return ""
    more = f" (and {len(changes) - 1} more)" if len(changes) > 1 else ""
    return f"resharding step {saved.manifest.step} {changes[0]}{more}"


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
    if layout_changes(plan, saved.plan()):
        remove_measurements(run)
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
    check_same(plan, saved.plan())
    if saved.manifest.step >= plan.training.steps:
        raise InputError(
            f"steps: {plan.training.steps} is not allowed: must be above {saved.manifest.step}, which {run} has done"
        )
    return saved
