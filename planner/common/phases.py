"""The phases of a rank's lifecycle and the memory tiers. The enum values are the strings that plans and runs store."""

from __future__ import annotations

from enum import StrEnum


class Phase(StrEnum):
    """A phase of a rank's lifecycle; tables list the phases in this order. A resumed run loads after INIT."""

    INIT = "init"
    FIRST_STEP = "first optimizer step"
    BETWEEN = "between steps"
    FORWARD = "forward"
    BACKWARD = "backward"
    STEP = "optimizer step"
    SAVE = "checkpoint save"
    EVALUATION = "evaluation"
    RESUME = "resume"


TRAINING_PHASES = (Phase.FORWARD, Phase.BACKWARD, Phase.STEP)
"""The phases that every training step repeats."""


class Tier(StrEnum):
    """A memory that a rank uses: its device, pageable and pinned host memory, files on NVMe."""

    DEVICE = "device"
    HOST = "host"
    PINNED = "pinned"
    NVME = "nvme"
