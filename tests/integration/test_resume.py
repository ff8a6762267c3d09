"""A resumed run is bitwise equal to an uninterrupted one, on every memory tier."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.runs import run_plan, write_plan
from helpers.waiting import wait_until

from translution.cli.main import run as run_cli
from translution.distributed.checkpoint.manifest import MANIFEST, best_checkpoint, checkpoint_tags, newest_checkpoint
from translution.distributed.runs.folder import CHECKPOINT, METRICS
from translution.distributed.runs.mode import RunMode
from translution.distributed.runs.status import read_statuses
from translution.distributed.runs.watchdog import process_is_alive
from translution.planner.common.machine import usable_cores

pytestmark = pytest.mark.skipif(usable_cores() < 2, reason="needs two cores")

WIDE = {"family": "vit", "image": 16, "patch": 4, "channels": 1, "classes": 10, "dim": 160, "depth": 1, "heads": 2}
"""On two ranks, only the tables of this model are large enough for NVMe, in fp32 and bf16."""
TABLE_BYTES = 52 * 160 * 160 * 4 // 2
"""Bytes of a rank's partition of a table; other swapped tensors are smaller."""
TINY = WIDE | {"dim": 16, "depth": 2, "heads": 2, "dropout": 0.1}
LARGE = {"model": WIDE, "tile": 52}
BF16 = {"precision": "bf16"} | LARGE
CASES: dict[str, dict[str, Any]] = {
    "3-dropout-accumulation": {"model": TINY, "accumulation": 2},
    "3-cpu-optimizer": {"offload": "cpu-optimizer", **LARGE},
    "3-cpu": {"offload": "cpu", **LARGE},
    "3-half-offloaded": {"offload": "cpu-optimizer", "ratio": 0.5, **BF16},
    "3-nvme-optimizer": {"offload": "nvme-optimizer", **LARGE},
    "3-nvme": {"offload": "nvme", **BF16},
}
STEPS, SAVED = 8, 5
"""After five steps, the powers of Adam's betas differ between products and ``pow``."""


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / METRICS).read_text().splitlines()]


def values(run: Path, after: int) -> list[tuple[Any, ...]]:
    """Metrics of the steps after a step, and of the evaluation."""
    names = ("event", "step", "loss", "grad_norm", "learning_rate", "accuracy")
    lines = [line for line in metrics(run) if line["event"] in ("step", "evaluation") and line["step"] > after]
    return [tuple(line.get(name) for name in names) for line in lines]


def tensors(value: Any) -> Iterator[torch.Tensor]:
    """Every tensor of an object from a checkpoint's file."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for name in sorted(value, key=str):
            yield from tensors(value[name])
    elif isinstance(value, list | tuple):
        for entry in value:
            yield from tensors(entry)


def assert_same_state(one: Path, other: Path) -> None:
    """Assert that two checkpoints are bitwise equal."""
    names = sorted(str(path.relative_to(one)) for path in one.rglob("*") if path.is_file() and path.name != MANIFEST)
    assert names == sorted(
        str(path.relative_to(other)) for path in other.rglob("*") if path.is_file() and path.name != MANIFEST
    )
    compared = 0
    for name in names:
        if name.endswith(".swp"):
            # The end is padding with arbitrary values.
            first, second = ((folder / name).read_bytes()[:TABLE_BYTES] for folder in (one, other))
            assert first == second, name
            assert len(first) == TABLE_BYTES
            compared += 1
        elif name.endswith(".pt"):
            pair = [torch.load(folder / name, weights_only=False, map_location="cpu") for folder in (one, other)]
            for first, second in zip(*map(list, map(tensors, pair)), strict=True):
                # Tensors on NVMe have no values in this file.
                if first.untyped_storage().nbytes() >= first.numel() * first.element_size():
                    assert torch.equal(first, second), name
                    compared += first.numel() > 1
    assert compared


@pytest.mark.parametrize("name", CASES)
def test_a_resumed_run_is_bitwise_equal_to_the_uninterrupted_one(name: str, tmp_path: Path) -> None:
    nvme = tmp_path / "nvme" if "nvme" in name else None
    if nvme:
        nvme.mkdir()
    options = {"steps": STEPS, "checkpoint_steps": SAVED, "learning_rate": 3e-3} | CASES[name]
    folder = write_plan(tmp_path / "plan", 2, nvme_path=nvme, **options)
    run = run_plan(folder, 2)
    assert checkpoint_tags(run / CHECKPOINT) == [f"step_{SAVED}", f"step_{STEPS}"]
    if nvme:
        assert list((run / CHECKPOINT / f"step_{SAVED}").rglob("exp_avg_sq-*.swp"))
    shutil.move(run, tmp_path / "uninterrupted")
    shutil.copytree(tmp_path / "uninterrupted", run)
    shutil.rmtree(run / CHECKPOINT / f"step_{STEPS}")
    (run / METRICS).write_text((run / METRICS).read_text()[:-200])  # A killed run leaves a torn line.
    assert run_plan(folder, 2, RunMode.CONTINUE) == run
    expected = values(tmp_path / "uninterrupted", SAVED)
    assert len(expected) == STEPS - SAVED + 1
    assert values(run, SAVED)[-len(expected) :] == expected
    last = f"{CHECKPOINT}/step_{STEPS}"
    assert_same_state(run / last, tmp_path / "uninterrupted" / last)


def write_images(folder: Path, seed: int = 0) -> Path:
    """Write 30 images to train on and 20 to evaluate, of ten classes and of several sizes."""
    from PIL import Image

    random = torch.Generator().manual_seed(seed)
    for part, each in (("train", 3), ("val", 2)):
        for label in range(10):
            (folder / part / f"class{label}").mkdir(parents=True)
            for number in range(each):
                pixels = torch.randint(12 * label, 12 * label + 130, (20 + 3 * number, 26), generator=random)
                image = Image.fromarray(pixels.to(torch.uint8).numpy())
                image.save(folder / part / f"class{label}" / f"{number}.png")
    return folder


def test_an_augmented_run_is_reproducible_and_resumable(tmp_path: Path) -> None:
    """One rank, images of files: neither evaluations, of which the best is kept, nor a monitor change the results."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    options: dict[str, Any] = {
        "model": TINY, "steps": STEPS, "checkpoint_steps": SAVED, "label_smoothing": 0.1, "warmup_steps": 0,
        "mixup": 0.8, "cutmix": 1.0, "flip": 0.5, "crop_scale": 0.3, "rand_augment_operations": 2,
        "data": "images", "data_path": str(write_images(tmp_path / "images")), "evaluation_crop": 0.875,
        "lr_schedule": "cosine-epoch", "epoch_steps": 3, "learning_rate": 0.03,
    }  # fmt: skip
    other = run_plan(write_plan(tmp_path / "other", 1, monitor="tensorboard", **options), 1)
    folder = write_plan(tmp_path / "plan", 1, monitor="csv", evaluation_steps=2, keep_best=True, **options)
    run = run_plan(folder, 1)
    steps = [line for line in values(run, 0) if line[0] == "step"]
    assert steps == [line for line in values(other, 0) if line[0] == "step"]
    assert [line["step"] for line in metrics(run) if line["event"] == "evaluation"] == [2, 4, 6, 8]
    assert len({line[2] for line in steps}) == STEPS
    assert [round(line[4] / 0.03, 6) for line in steps] == [1.0] * 3 + [0.75] * 3 + [0.25] * 2
    accuracies = {line["step"]: line["accuracy"] for line in metrics(run) if line["event"] == "evaluation"}
    best = best_checkpoint(run / CHECKPOINT)
    assert best is not None
    assert best.manifest.step == max(accuracies, key=lambda step: accuracies[step])
    assert {f"step_{SAVED}", f"step_{STEPS}", best.tag} >= set(checkpoint_tags(run / CHECKPOINT)) >= {best.tag}
    last = f"{CHECKPOINT}/step_{STEPS}"
    assert_same_state(run / last, other / last)

    shutil.copytree(run, tmp_path / "uninterrupted")
    shutil.rmtree(run / last)
    assert run_plan(folder, 1, RunMode.CONTINUE) == run
    again = values(tmp_path / "uninterrupted", SAVED)
    assert values(run, SAVED)[-len(again) :] == again
    assert_same_state(run / last, other / last)

    # Other data of the same size is noticed.
    shutil.rmtree(run / last)
    write_images(tmp_path / "others", seed=1)
    shutil.rmtree(tmp_path / "images")
    (tmp_path / "others").rename(tmp_path / "images")
    with pytest.raises(AssertionError, match=r"its content is not what .*step_5 was trained on"):
        run_plan(folder, 1, RunMode.CONTINUE)

    file = run / "monitor" / "csv" / "Train_loss.csv"
    rows = [f"{line[1]},{line[2]}" for line in steps]
    assert file.read_text().splitlines() == ["step,loss", *rows, *rows[SAVED:]]
    board = EventAccumulator(str(other / "monitor" / "tensorboard"))
    board.Reload()
    shown = {name: [(event.step, event.value) for event in board.Scalars(name)] for name in board.Tags()["scalars"]}
    assert shown["Train/loss"] == [(line[1], pytest.approx(line[2])) for line in steps]
    assert shown["Evaluation/accuracy"] == [(STEPS, pytest.approx(values(other, 0)[-1][-1]))]


def run_until_step(folder: Path, step: int) -> subprocess.Popen[str]:
    """Launch a plan and return when its first run has reached a step."""
    command = [sys.executable, "-m", "translution.cli", "launch", str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    path = folder / "runs" / "001" / METRICS
    wait_until(lambda: path.exists() and path.read_text().count('"event": "step"') >= step, process=process)
    return process


def errors_of(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one-line error of a command."""
    capsys.readouterr()
    assert run_cli(arguments) in (1, 2)
    text = capsys.readouterr().err
    assert text.count("\n") == 1
    return text


def test_a_killed_launch_resumes_from_its_last_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options: dict[str, Any] = {"model": TINY, "checkpoint_steps": 4, "keep_checkpoints": 2}
    folder = write_plan(tmp_path / "plan", 2, steps=100_000, **options)
    run = folder / "runs" / "001"
    launch = ["launch", str(folder), "--resume"]
    assert "holds no run with a complete checkpoint" in errors_of(launch, capsys)
    process = run_until_step(folder, 14)
    pids = [status.pid for status in read_statuses(run)]
    process.kill()
    process.communicate()
    wait_until(lambda: not any(map(process_is_alive, pids)))
    complete = checkpoint_tags(run / CHECKPOINT)
    assert len(complete) == 2
    saved = newest_checkpoint(run / CHECKPOINT)
    assert saved is not None
    step = saved.manifest.step
    assert step in range(12, 100_000, 4)

    # A different training and a damaged checkpoint are refused.
    write_plan(folder, 2, force=True, steps=step, **options)
    assert f"steps: {step} is not allowed: must be above {step}" in errors_of(launch, capsys)
    write_plan(folder, 2, force=True, steps=step + 3, **options | {"model": TINY | {"dim": 32}})
    assert "model.dim: 32 is not allowed: must be 16, as in the run to resume" in errors_of(launch, capsys)
    write_plan(folder, 1, force=True, steps=step + 3, **options)
    assert "x ranks 1) is not allowed: must be 16, as in the run to resume" in errors_of(launch, capsys)
    write_plan(folder, 2, force=True, steps=step + 3, **options)
    file = next((run / CHECKPOINT / saved.tag).glob("*optim_states.pt"))
    content = file.read_bytes()
    file.write_bytes(content[:-1])
    error = errors_of(launch, capsys)
    assert f"{file}: holds {len(content) - 1} bytes and must hold {len(content)} bytes" in error
    assert f"remove {run / CHECKPOINT / saved.tag} to resume from {complete[0]}" in error
    file.write_bytes(content)

    assert run_cli([*launch, "--dry-run"]) == 0
    assert f"{run} --mode continue" in capsys.readouterr().out
    assert run_cli(launch) == 0
    lines = metrics(run)
    assert [line["step"] for line in lines if line["event"] == "resume"] == [step]
    assert [line["step"] for line in lines if line["event"] == "step"][-3:] == [step + 1, step + 2, step + 3]
    assert checkpoint_tags(run / CHECKPOINT) == [saved.tag, f"step_{step + 3}"]
