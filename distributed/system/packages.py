"""Check that the packages that only some plans need are installed."""

from __future__ import annotations

import importlib.util

from translution.planner.common import MissingPackageError
from translution.planner.config import TrainingSpec

_INSTALL_COMMANDS = {
    "kornia": "pip install 'translution-scale[train]'",
    "bitsandbytes": "pip install 'translution-scale[8bit]'",
    "tensorboard": "pip install 'translution-scale[tensorboard]'",
    "wandb": "pip install wandb",
}


def check_training_packages(training: TrainingSpec) -> None:
    """Check that the packages for the plan's image augmentation, optimizer and metrics monitor are installed.

    Raises:
        MissingPackageError: names the missing one.
    """
    needed = ["kornia"] if training.augmentation else []
    needed += ["bitsandbytes"] if training.quantizes_states else []
    needed += [training.monitor] if training.monitor in _INSTALL_COMMANDS else []
    for package in needed:
        if importlib.util.find_spec(package) is None:
            raise MissingPackageError(f"{package} is missing: {_INSTALL_COMMANDS[package]}")
