"""What the ranks of a run do."""

from __future__ import annotations

import os
from enum import StrEnum

from translution.planner.common import InputError

MEMORY_VARIABLE = "TRANSLUTION_MEMORY"
"""Environment variable that chooses what training ranks record: "process", or by default torch's allocations."""
CHECK_SWAP = "TRANSLUTION_CHECK_SWAP"
"""Environment variable that is set for ranks that compare what they read from NVMe with what they wrote."""


def checks_swap() -> bool:
    """Return whether this rank compares its swap files; it does if `CHECK_SWAP` is set to anything but 0."""
    return os.environ.get(CHECK_SWAP, "0") not in ("", "0")


class RunMode(StrEnum):
    """What every rank of a run does; the values are the words of ``train --mode``."""

    TRAIN = "train"
    """Train and evaluate."""
    CONTINUE = "continue"
    """Resume from the newest checkpoint, train the remaining steps and evaluate."""
    MEASURE = "measure"
    """Train a few steps and trace allocations, without evaluation."""
    MEASURE_RESUME = "resume"
    """Only read the newest checkpoint and trace allocations."""
    MEASURE_PROCESS = "process"
    """Train a few steps and record the process's resident memory, without evaluation."""
    MEASURE_RESUME_PROCESS = "resume-process"
    """Only read the newest checkpoint and record the process's resident memory."""

    @property
    def only_resumes(self) -> bool:
        """Whether the ranks end when they have read the checkpoint."""
        return self in (RunMode.MEASURE_RESUME, RunMode.MEASURE_RESUME_PROCESS)

    @property
    def records_process(self) -> bool:
        """Whether the process's resident memory is recorded, not torch's allocations.

        A run that trains records it if the environment variable `MEMORY_VARIABLE` is "process".
        """
        if self in (RunMode.TRAIN, RunMode.CONTINUE):
            return os.environ.get(MEMORY_VARIABLE) == "process"
        return self in (RunMode.MEASURE_PROCESS, RunMode.MEASURE_RESUME_PROCESS)

    @classmethod
    def _missing_(cls, value: object) -> RunMode:
        raise InputError(f"mode: {value!r} is not allowed: must be one of {', '.join(cls)}")
