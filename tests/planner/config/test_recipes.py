"""Recipes: the authors' settings by name, which other settings change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from translution import planner
from translution.cli.main import run
from translution.planner.config.recipes import RECIPES, find_recipe
from translution.planner.config.training import TrainingSpec

PATHS = {"translution-vit": "/data/imagenet", "translution-gpt": "/data/openwebtext"}
MODELS = {"translution-vit": "vit-tiny/56", "translution-gpt": "gpt-tiny/160"}


def planned(recipe: str, cluster: str = "1xH100", **settings: Any) -> TrainingSpec:
    values = {"data_path": PATHS[recipe], "stage": 0} | settings
    return planner.plan(MODELS[recipe], cluster, recipe=recipe, **values).plan.training


def test_images_are_trained_on_as_the_authors_do() -> None:
    """Figures of their ViT/main.py: 5,005 batches of 256 in each of 300 epochs."""
    training = planned("translution-vit")
    assert (training.steps, training.epoch_steps, training.evaluation_steps) == (1_501_500, 5005, 5005)
    assert training.micro_batch * training.gradient_accumulation_steps == 256
    assert (training.lr_schedule, training.warmup_steps, training.learning_rate) == ("cosine-epoch", 0, 3e-4)
    assert (training.optimizer, training.weight_decay, training.betas) == ("adamw", 0.05, (0.9, 0.999))
    assert (training.rand_augment_operations, training.rand_augment_magnitude) == (2, 9)
    assert (training.cutmix, training.mixup, training.flip, training.crop_scale) == (1.0, 0.8, 0.5, 0.08)
    assert training.evaluation_crop == 224 / 256
    assert (training.gradient_clipping, training.label_smoothing, training.dtype_bytes) == (0, 0, 4)
    assert (training.evaluation_samples, training.keep_best, training.keep_checkpoints) == (0, True, 1)


def test_text_is_trained_on_as_the_authors_do() -> None:
    """Figures of their GPT/main.py: 32,000 random windows an epoch, 8 at a time."""
    training = planned("translution-gpt")
    assert (training.steps, training.epoch_steps, training.checkpoint_steps) == (1_200_000, 4000, 4000)
    assert training.micro_batch * training.gradient_accumulation_steps == 8
    assert (training.token_windows, training.gradient_clipping) == ("random", 1.0)
    assert (training.data, training.augmentation, training.evaluation_crop) == ("tokens", "", 1.0)


def test_other_settings_change_a_recipe() -> None:
    training = planned("translution-vit", samples=1000, epochs=2.5, global_batch=100, mixup=0.0, learning_rate=1e-3)
    assert (training.epoch_steps, training.steps, training.evaluation_steps) == (10, 25, 10)
    assert (training.mixup, training.cutmix, training.learning_rate) == (0.0, 1.0, 1e-3)
    short = planned("translution-gpt", steps=50)
    assert (short.steps, short.epoch_steps) == (50, 4000)
    per_step = planned("translution-gpt", lr_schedule="cosine", evaluation_steps=7)
    assert (per_step.lr_schedule, per_step.evaluation_steps) == ("cosine", 7)


def test_a_recipe_can_be_tried_with_other_data() -> None:
    """What only image files allow is left out."""
    plan = planner.plan("vit-tiny/56", "1xH100", recipe="translution-vit", data="digits", samples=1433, stage=0).plan
    training = plan.training
    assert (training.data, training.rand_augment_operations, training.evaluation_crop) == ("digits", 0, 1.0)
    assert (training.mixup, training.crop_scale, training.epoch_steps) == (0.8, 0.08, 6)
    text = planner.plan("gpt-tiny/160", "1xH100", recipe="translution-gpt", data="stdlib", stage=0).plan.training
    assert (text.data, text.token_windows) == ("stdlib", "random")


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_holds_only_fields_of_training(name: str) -> None:
    recipe = find_recipe(name, planner.load_model(MODELS[name]))
    assert set(recipe.fields(5)) <= set(TrainingSpec.model_fields)
    assert recipe.source


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["vit-tiny/56", "--recipe", "translution-vitt"],
            "must be translution-vit or translution-gpt (did you mean 'tr",
        ),
        (
            ["gpt-tiny/160", "--recipe", "translution-vit"],
            "recipe: 'translution-vit' is not allowed: must be used with a v",
        ),
        (["vit-tiny/56", "--recipe", "translution-vit"], "data_path: is required with data images"),
        (
            ["vit-tiny/56", "--train", "rand_augment_operations=2"],
            "rand_augment_operations: 2 is not allowed: must be 0 w",
        ),
        (["vit-tiny/56", "--steps", "9", "--samples", "90"], "steps: 9 is not allowed: must be left out with samples"),
        (
            ["vit-tiny/56", "--recipe", "translution-vit", "--steps", "9", "--epochs", "3"],
            "steps: 9 is not allowed: must be left out with epochs, which sets them",
        ),
        (["vit-tiny/56", "--epochs", "3"], "epochs: 3.0 is not allowed: must be used with samples or a recipe"),
        (
            ["vit-tiny/56", "--recipe", "translution-vit", "--epochs", "0"],
            "epochs: 0.0 is not allowed: must be above 0",
        ),
        (["vit-tiny/56", "--recipe", "translution-vit", "--epochs", "inf"], "epochs: inf is not allowed"),
        (
            ["vit-tiny/56", "--train", "lr_schedule=cosine-epoch"],
            "epoch_steps: is required with lr_schedule cosine-epoch",
        ),
        (
            ["vit-tiny/56", "--data", "synthetic", "--train", "keep_best=true"],
            "keep_best: True is not allowed: held-out samples must be evaluated",
        ),
        (
            ["vit-tiny/56", "--train", "evaluation_crop=0.9"],
            "evaluation_crop: 0.9 is not allowed: must be 1 with data s",
        ),
    ],
)
def test_contradictions_are_one_line(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["plan", *arguments, "--cluster", "1xH100", "--out", str(tmp_path / "plan")]) == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert printed.count("\n") == 1
    assert not (tmp_path / "plan").exists()


def test_the_printed_plan_tells_the_epochs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["plan", "gpt-tiny/160", "--cluster", "1xH100", "--recipe", "translution-gpt", "--stage", "0"]
    assert run([*command, "--train", "data_path=/data/text", "--out", str(tmp_path / "plan")]) == 0
    assert "1,200,000 steps (300 epochs) in " in capsys.readouterr().out
