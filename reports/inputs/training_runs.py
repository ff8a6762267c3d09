"""What training runs recorded of each step, for charts and tables of several runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from pydantic import ValidationError

from translution.distributed.runs import memory_path
from translution.planner.common import InputError, Provenance
from translution.planner.plans import RUNS, Plan, load_plan

from .run_accuracy import read_metrics

LOSS, RATE, GRADIENT_NORM, SECONDS, THROUGHPUT = "loss", "learning_rate", "grad_norm", "seconds", "samples_per_s"
_FIGURES = (LOSS, RATE, GRADIENT_NORM, SECONDS, THROUGHPUT)
MAX_RUNS = 9
"""Largest number of runs in one chart, each with a colour of its own."""


@dataclass(frozen=True, slots=True)
class TrainingRun:
    """The steps and evaluations of one run."""

    label: str
    """Name of the run in charts and tables; no other run of the report has it."""
    folder: Path
    plan: Plan
    steps: pd.DataFrame
    """A row per step, sorted: its number "step", then loss, learning rate, gradient norm, seconds and samples per
    second; NaN where nothing finite was recorded. At least one row."""
    evaluations: pd.DataFrame
    """A row per evaluation: its "step", loss and accuracy; NaN where there is none."""
    made: Provenance | None
    """Provenance of the run's last launch from the start; None if an earlier version made the run."""

    @property
    def later_steps(self) -> pd.DataFrame:
        """The steps after the first of the run, which is slower; all of them if there is one only."""
        return self.steps.iloc[1:] if len(self.steps) > 1 else self.steps

    def last(self, figure: str) -> float | None:
        """Return the last recorded value of a figure of the steps, if any."""
        known = self.steps[figure].dropna()
        return None if known.empty else float(known.iloc[-1])


def _numbers(rows: pd.DataFrame, columns: Sequence[str]) -> pd.DataFrame:
    """Return these columns as floats, NaN where a row has no finite number, for rows with the number of a step."""
    values = {
        name: pd.to_numeric(rows[name], errors="coerce") if name in rows else math.nan for name in ("step", *columns)
    }
    found: pd.DataFrame = pd.DataFrame(values, index=rows.index, dtype=float)
    found = found.where(found.abs() < math.inf).dropna(subset=["step"])
    return found.astype({"step": int}).sort_values("step", ignore_index=True)


def _made(metrics: pd.DataFrame) -> Provenance | None:
    started = metrics[metrics["event"] == "start"].to_dict("records")
    found = started[-1].get("made") if started else None
    try:
        return Provenance.model_validate(found) if isinstance(found, dict) else None
    except ValidationError:
        return None


def read_run(folder: Path, label: str) -> TrainingRun | None:
    """Read what a run recorded of its steps; None if it has finished no step.

    Args:
        folder: the run folder.
        label: name of the run in charts and tables.

    Raises:
        InputError: if the folder's plan or its metrics are invalid.
    """
    metrics = read_metrics(folder)
    if "event" not in metrics:
        return None
    steps = _numbers(metrics[metrics["event"] == "step"], _FIGURES)
    if steps.empty:
        return None
    evaluations = _numbers(metrics[metrics["event"] == "evaluation"], ("loss", "accuracy"))
    return TrainingRun(label, folder, load_plan(folder), steps, evaluations, _made(metrics))


def find_shown_run(folder: Path) -> Path | None:
    """Return the run that a report of this folder shows.

    Returns:
        The folder itself if it is a run folder; of a plan folder the newest run that measured its memory, or else the
        newest; None if there is none.
    """
    if memory_path(folder, 0).parent.is_dir():
        return folder
    runs = sorted(
        (path for path in (folder / RUNS).glob("*") if path.is_dir()),
        key=lambda path: path.stat().st_mtime,
        reverse=True,
    )
    return next((run for run in runs if has_measurement(run)), runs[0] if runs else None)


def has_measurement(run: Path) -> bool:
    """Return True if a rank of the run has measured its memory."""
    return any(memory_path(run, 0).parent.glob("rank_*.json"))


def read_runs(folders: Sequence[Path]) -> list[TrainingRun]:
    """Read the runs that a report of these folders shows, each once; runs that finished no step are left out.

    Args:
        folders: plan folders or run folders.

    Raises:
        InputError: if there are more than `MAX_RUNS`, or a file is invalid.
    """
    shown = list(dict.fromkeys(path for folder in folders if (path := find_shown_run(folder)) is not None))
    names = [path.name for path in shown]
    labels = names if len(set(names)) == len(names) else [str(path) for path in shown]
    found = [run for path, label in zip(shown, labels, strict=True) if (run := read_run(path, label)) is not None]
    if len(found) > MAX_RUNS:
        raise InputError(f"{len(found)} runs are not allowed in one report: at most {MAX_RUNS}, one for each colour")
    return found
