"""Whether the packages are installed that only some plans need, found before anything starts."""

from __future__ import annotations

import importlib.util

from translution.planner.common.errors import MissingPackageError
from translution.planner.config.training import TrainingSpec

_INSTALL = {
    "kornia": "pip install 'translution-scale[train]'",
    "tensorboard": "pip install 'translution-scale[tensorboard]'",
    "wandb": "pip install wandb",
}


def check_training_packages(training: TrainingSpec) -> None:
    """Whether what augments the images and what shows the metrics is installed.

    Raises:
        MissingPackageError: naming the one that is absent.
    """
    needed = ["kornia"] if training.augmentation else []
    needed += [training.monitor] if training.monitor in _INSTALL else []
    for package in needed:
        if importlib.util.find_spec(package) is None:
            raise MissingPackageError(f"{package} is missing: {_INSTALL[package]}")
