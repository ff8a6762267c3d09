"""Which checkpoints of a run are the newest and the best, and which are kept."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.runs import write_plan

from translution.distributed.checkpoint.manifest import (
    MANIFEST,
    EvaluationResult,
    Manifest,
    best_checkpoint,
    best_tag,
    checkpoint_tags,
    is_best,
    saved_unix_s,
    write_evaluation,
)
from translution.distributed.checkpoint.resume import find_resumable
from translution.distributed.checkpoint.save_load import prune
from translution.distributed.training.evaluation import perplexity
from translution.planner.common.errors import InputError
from translution.planner.plans.plan import load_plan

NAN = float("nan")


def images(accuracy: float, loss: float = 1.0) -> EvaluationResult:
    return EvaluationResult(samples=8, loss=loss, accuracy=accuracy, top5_accuracy=1.0)


def text(loss: float, accuracy: float = 0.5) -> EvaluationResult:
    return EvaluationResult(samples=8, loss=loss, accuracy=accuracy, perplexity=perplexity(loss))


def save(folder: Path, step: int, evaluation: EvaluationResult | None = None) -> None:
    path = folder / f"step_{step}"
    path.mkdir(parents=True)
    (path / "states").write_bytes(b"0123")
    manifest = Manifest(step=step, ranks=1, files={"states": 4}, evaluation=evaluation)
    (path / MANIFEST).write_text(manifest.model_dump_json())


def test_images_are_compared_by_accuracy_and_text_by_loss() -> None:
    assert images(0.6, loss=3.0).is_better(images(0.5, loss=1.0))
    assert not images(0.5).is_better(images(0.5))
    assert text(1.0, accuracy=0.1).is_better(text(2.0, accuracy=0.9))
    assert not text(2.0).is_better(text(1.0))
    assert text(2.0).is_better(text(NAN))
    assert not text(NAN).is_better(text(2.0))
    assert not text(NAN).is_better(text(NAN))


@pytest.mark.parametrize("loss", [NAN, float("inf")])
def test_the_loss_of_a_model_that_has_diverged_is_stored(loss: float, tmp_path: Path) -> None:
    save(tmp_path, 5)
    write_evaluation(tmp_path, "step_5", text(loss))
    found = best_checkpoint(tmp_path)
    assert found is not None
    assert found.manifest.evaluation is not None
    assert str(found.manifest.evaluation.loss) == str(loss)


def test_the_best_checkpoint_is_the_oldest_of_equal_ones(tmp_path: Path) -> None:
    assert best_tag(tmp_path) is None
    assert is_best(tmp_path, images(0.0))
    save(tmp_path, 5)
    assert best_checkpoint(tmp_path) is None
    for step, accuracy in ((10, 0.3), (20, 0.7), (30, 0.7), (40, 0.1)):
        save(tmp_path, step, images(accuracy))
    found = best_checkpoint(tmp_path)
    assert found is not None
    assert (found.tag, found.manifest.step) == ("step_20", 20)
    assert is_best(tmp_path, images(0.71))
    assert not is_best(tmp_path, images(0.7))
    (tmp_path / "step_20" / "states").write_bytes(b"01")
    with pytest.raises(InputError, match=r"step_20/states: holds 2 bytes and must hold 4 bytes: the checkpoint is dam"):
        best_checkpoint(tmp_path)


def test_a_result_is_added_to_a_manifest(tmp_path: Path) -> None:
    save(tmp_path, 5)
    write_evaluation(tmp_path, "step_5", images(0.3))
    found = best_checkpoint(tmp_path)
    assert found is not None
    assert found.manifest == Manifest(step=5, ranks=1, files={"states": 4}, evaluation=images(0.3)).signed()


def test_the_newest_checkpoints_and_the_best_stay(tmp_path: Path) -> None:
    plan = load_plan(write_plan(tmp_path / "plan", 1, keep_checkpoints=2, keep_best=True))
    for step, accuracy in ((10, 0.3), (20, 0.7), (30, 0.2), (40, 0.1)):
        save(tmp_path / "runs", step, images(accuracy))
    prune(tmp_path / "runs", plan)
    assert checkpoint_tags(tmp_path / "runs") == ["step_20", "step_30", "step_40"]
    save(tmp_path / "runs", 50, images(0.8))
    prune(tmp_path / "runs", plan)
    assert checkpoint_tags(tmp_path / "runs") == ["step_40", "step_50"]
    plain = load_plan(write_plan(tmp_path / "plain", 1, keep_checkpoints=1))
    prune(tmp_path / "runs", plain)
    assert checkpoint_tags(tmp_path / "runs") == ["step_50"]


def test_a_damaged_checkpoint_is_never_the_best_and_does_not_stop_saving(tmp_path: Path) -> None:
    for step, accuracy in ((10, 0.9), (20, 0.7)):
        save(tmp_path, step, images(accuracy))
    (tmp_path / "step_10" / MANIFEST).write_text("")
    assert best_tag(tmp_path) == "step_20"
    assert is_best(tmp_path, images(0.8))


def test_the_time_of_saving_is_the_recorded_one(tmp_path: Path) -> None:
    save(tmp_path, 5)
    assert saved_unix_s(tmp_path, "step_5") == (tmp_path / "step_5").stat().st_mtime
    manifest = Manifest(step=5, ranks=1, files={"states": 4}, saved_unix_s=1000.5)
    (tmp_path / "step_5" / MANIFEST).write_text(manifest.model_dump_json())
    assert saved_unix_s(tmp_path, "step_5") == 1000.5


def test_the_newest_run_is_the_one_that_saved_last_by_its_record(tmp_path: Path) -> None:
    """A copied or touched run has the newest files, not the newest training."""
    folder = write_plan(tmp_path / "plan", 1, steps=50)
    plan = load_plan(folder)
    for name, saved in (("001", 3000.0), ("002", 2000.0)):
        run = folder / "runs" / name
        (run / "status").mkdir(parents=True)
        (run / "plan.json").write_text((folder / "plan.json").read_text())
        save(run / "checkpoint", 5)
        manifest = Manifest(step=5, ranks=1, files={"states": 4}, saved_unix_s=saved)
        (run / "checkpoint" / "step_5" / MANIFEST).write_text(manifest.model_dump_json())
    found, ref = find_resumable(plan, folder, None)
    assert found == folder / "runs" / "001"
    assert ref.manifest.saved_unix_s == 3000.0
