"""What a rank writes while it trains: its status and, on one rank, the metrics of the run."""

from __future__ import annotations

import json
import math
import os
import shlex
import sys
import time
from pathlib import Path

from translution.planner.common import make_provenance
from translution.planner.plans import Plan

from ..checkpoint.manifest import EvaluationResult
from ..runs.folder import METRICS, trim_metrics
from ..runs.status import RankStatus, write_status
from .engine import Engine
from .monitor import RunMonitor

PROGRESS_SECONDS = 2.0
"""Seconds between two reports of progress."""


class RunLog:
    """Writes one rank's files in a run folder.

    Args:
        plan: what is trained.
        run: the run folder.
        rank: number of the rank.
        writes_metrics: whether this rank writes the metrics file and the monitor.
    """

    def __init__(self, plan: Plan, run: Path, rank: int, *, writes_metrics: bool) -> None:
        self.plan, self.run, self.rank, self.writes_metrics = plan, run, rank, writes_metrics
        self.monitor = RunMonitor("none", run)
        self._progress_time = self._status_time = -math.inf

    def report_status(self, state: str, step: int, message: str = "") -> None:
        """Write the rank's status file."""
        status = {"rank": self.rank, "state": state, "step": step, "message": message, "pid": os.getpid()}
        write_status(self.run, RankStatus.model_validate(status))
        self._status_time = time.monotonic()

    def write(self, **values: object) -> None:
        """Append a line to the metrics file if this rank writes it."""
        if self.writes_metrics:
            with (self.run / METRICS).open("a", encoding="utf-8") as file:
                file.write(json.dumps(values) + "\n")

    def start(self, step: int, world_size: int, *, resume: bool, monitored: bool) -> None:
        """Write the first line of a launch and open the monitor.

        Args:
            step: number of the first step, from 0.
            world_size: number of ranks.
            resume: whether the launch resumes the run.
            monitored: whether the plan's monitor receives the metrics too.
        """
        if resume and self.writes_metrics:
            trim_metrics(self.run)
        training = self.plan.training
        made = make_provenance(shlex.join(["translution", *sys.argv[1:]]), ("torch", "deepspeed"))
        self.write(
            event="resume" if resume else "start",
            step=step,
            steps=training.steps,
            ranks=world_size,
            global_batch=training.global_batch(world_size),
            made=made.model_dump(),
        )
        if monitored and self.writes_metrics:
            self.monitor = RunMonitor(training.monitor, self.run)

    def write_step(self, step: int, loss: float, seconds: float, engine: Engine) -> None:
        """Write the metrics of a step, counted from 1."""
        norm = engine.gradient_norm()
        values = {
            "loss": loss,
            "grad_norm": norm if norm is not None and math.isfinite(norm) else None,
            "learning_rate": engine.learning_rate,
            "samples_per_s": self.plan.training.global_batch(engine.world_size) / seconds,
        }
        self.write(event="step", step=step, seconds=seconds, **values)
        self.monitor.write("Train", step, values)

    def write_progress(self, step: int, done: int, samples: int) -> None:
        """Write how many samples of an evaluation are done, at its start and every few seconds."""
        now = time.monotonic()
        if done == 0 or now - self._progress_time >= PROGRESS_SECONDS:
            self._progress_time = now
            self.write(event="evaluating", step=step, done=done, samples=samples)

    def is_status_old(self) -> bool:
        """Return True if the status was written more than `PROGRESS_SECONDS` ago."""
        return time.monotonic() - self._status_time >= PROGRESS_SECONDS

    def write_evaluation(self, step: int, result: EvaluationResult) -> None:
        """Write the result of an evaluation after a number of steps."""
        values = result.model_dump(exclude_none=True)
        self.write(event="evaluation", step=step, **values)
        values.pop("samples")
        self.monitor.write("Evaluation", step, values)
