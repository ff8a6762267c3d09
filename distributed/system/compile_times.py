"""How long DeepSpeed's ops take to compile: an estimate from measured work, until this machine has compiled them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from translution.planner.common import Schema, usable_cores

START_SECONDS = 5.0
"""Seconds to import torch and DeepSpeed, link and load; ninja cannot share them among cores."""


@dataclass(frozen=True, slots=True)
class OpSource:
    """What ninja compiles for one op."""

    library: str
    """Name of the compiled library, without its ending."""
    total_s: float | None
    """Processor seconds of all files; None if nobody has measured them."""
    longest_s: float = 0.0
    """Processor seconds of the file that takes longest: no number of cores compiles the op faster."""


OPS = {
    "ShareMemCommBuilder": OpSource("deepspeed_shm_comm", 81.0, 42.0),
    "CPUAdamBuilder": OpSource("cpu_adam", 126.0, 66.0),
    "CPULionBuilder": OpSource("cpu_lion", 116.0, 58.0),
    "CPUAdagradBuilder": OpSource("cpu_adagrad", 55.0, 55.0),
    "PinMemoryBuilder": OpSource("pin_memory", 63.0, 32.0),
    "AsyncIOBuilder": OpSource("async_io", 501.0, 60.0),
    "FusedAdamBuilder": OpSource("fused_adam", None),
    "FusedLionBuilder": OpSource("fused_lion", None),
}
"""The ops that plans need, by the names of DeepSpeed's builders.

Source: processor time of all compilers, each op once in an empty folder, with g++ 12.2 on 2 cores of an Intel Xeon,
torch 2.13.0+cpu, DeepSpeed 0.19.8, 2026-11-27; the longest file's share is that of ninja's log. Other programs ran at
the same time, except for ShareMemComm. nvcc compiles FusedAdam and FusedLion, which were not
measured.
"""


class OpDuration(Schema):
    """Time that a machine took to compile an op."""

    seconds: float
    """Seconds from the start of the process to its end."""
    jobs: int
    """Number of files that ninja compiled at the same time."""


def compile_jobs(environment: Mapping[str, str]) -> int:
    """Return the number of files to compile at the same time: ``MAX_JOBS``, but at most the usable cores."""
    asked, cores = environment.get("MAX_JOBS", ""), usable_cores()
    return min(int(asked), cores) if asked.isdecimal() and int(asked) else cores


def _from_work(op: str, jobs: int) -> float | None:
    source = OPS[op]
    return None if source.total_s is None else START_SECONDS + max(source.longest_s, source.total_s / jobs)


def estimate_seconds(op: str, jobs: int, before: OpDuration | None = None) -> float | None:
    """Estimate the seconds to compile an op.

    Args:
        op: name of its builder.
        jobs: number of files to compile at the same time.
        before: what this machine took earlier; it replaces the estimate from the measured work, and is converted if the
            number of jobs was another.

    Returns:
        None if the op was measured neither here nor for `OPS`.
    """
    now = _from_work(op, jobs)
    if before is None:
        return now
    then = _from_work(op, before.jobs)
    return before.seconds if now is None or then is None else before.seconds * now / then


def format_seconds(seconds: float) -> str:
    """Return whole seconds, or minutes from two minutes on: ``40 s``, ``3 min``."""
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
