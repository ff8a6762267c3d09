"""Recipes: training settings that were published together. `plan` takes one by name; other settings change it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from ..common.errors import InputError, nearest
from ..common.schema import Schema
from ..common.types import Positive
from .datasets import DataKind
from .model import ModelSpec


class Recipe(Schema):
    """How someone trained a family of models."""

    family: Literal["vit", "gpt", "video"]
    """Family of the models."""
    source: str
    """Where the recipe is published."""
    samples: Positive
    """Training samples of one epoch."""
    epochs: Positive
    global_batch: Positive
    """Samples of one optimizer step over all ranks."""
    data: DataKind
    training: Mapping[str, object]
    """Other fields of `TrainingSpec`. The steps follow from samples, epochs and batch."""
    own_data: Mapping[str, object] = {}
    """Fields that only the recipe's own kind of data allows."""

    def fields(self, epoch_steps: int, data: object = None) -> dict[str, object]:
        """Return the fields of `TrainingSpec`, apart from the steps.

        The learning rate falls, held-out samples are evaluated and a checkpoint is saved once per epoch.

        Args:
            epoch_steps: optimizer steps of one epoch.
            data: kind of data that is used instead of the recipe's; None uses the recipe's.
        """
        steps = {"epoch_steps": epoch_steps, "evaluation_steps": epoch_steps, "checkpoint_steps": epoch_steps}
        own = self.own_data if data in (None, self.data) else {}
        return {"lr_schedule": "cosine-epoch", "data": self.data, **steps, **self.training, **own}


_COMMON: dict[str, object] = {
    "precision": "fp32",
    "optimizer": "adamw",
    "learning_rate": 3e-4,
    "weight_decay": 0.05,
    "betas": (0.9, 0.999),
    "epsilon": 1e-8,
    "warmup_steps": 0,
    "evaluation_samples": 0,
    "keep_checkpoints": 1,
    "keep_best": True,
}
_SOURCE = "github.com/hehefan/Translution at 13730aa"

RECIPES: dict[str, Recipe] = {
    "translution-vit": Recipe(
        family="vit",
        source=f"{_SOURCE}, ViT/main.py",
        samples=1_281_167,
        epochs=300,
        global_batch=256,
        data="images",
        training=_COMMON | {"gradient_clipping": 0.0, "crop_scale": 0.08, "flip": 0.5, "cutmix": 1.0, "mixup": 0.8},
        own_data={"rand_augment_operations": 2, "rand_augment_magnitude": 9, "evaluation_crop": 0.875},
    ),
    "translution-gpt": Recipe(
        family="gpt",
        source=f"{_SOURCE}, GPT/main.py",
        samples=32_000,
        epochs=300,
        global_batch=8,
        data="tokens",
        training=_COMMON | {"gradient_clipping": 1.0, "token_windows": "random"},
    ),
}
"""The authors' recipes. Their images are those of ImageNet-1k, their text is OpenWebText."""


def find_recipe(name: str, model: ModelSpec) -> Recipe:
    """Return a recipe for a model.

    Args:
        name: a name in `RECIPES`.
        model: the model to train.

    Raises:
        InputError: for an unknown name, or a model of another family.
    """
    recipe = RECIPES.get(name)
    if recipe is None:
        raise InputError(
            f"recipe: {name[:60]!r} is not allowed: must be {' or '.join(RECIPES)}{nearest(name, tuple(RECIPES))}"
        )
    if recipe.family != model.family:
        raise InputError(f"recipe: {name!r} is not allowed: must be used with a {recipe.family} model")
    return recipe
