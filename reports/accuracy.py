"""Predicted against measured: the memory of every rank of a run, in one table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd

from translution.distributed.run_files import CHECKPOINT, METRICS, RUNS, read_memory, require_run, status_path
from translution.planner.errors import InputError
from translution.planner.plan import load_plan

COLUMNS = ("rank", "what", "predicted_bytes", "measured_bytes", "ratio")
RESIDENT, PEAK = "between steps", "peak of the step"


def find_run(folder: Path) -> Path:
    """A run folder itself, or the newest run of a plan folder.

    Raises:
        InputError: if it is neither, or the plan has no run yet.
    """
    if status_path(folder, 0).parent.is_dir():
        return require_run(folder)
    runs = sorted((path for path in (folder / RUNS).glob("*") if path.is_dir()), key=lambda path: path.stat().st_mtime)
    if not runs:
        raise InputError(f"{folder}: is not a run folder, nor a plan folder with runs")
    return require_run(runs[-1])


def compare(run: Path) -> pd.DataFrame:
    """Predicted and measured bytes of every rank, with the columns of `COLUMNS`.

    Entries that can be told apart come first, then what is live between steps, the peak of each
    phase, and the peak of the step. ``ratio`` is predicted over measured; entries measured as
    nought have none.

    Raises:
        InputError: if it is no run folder, or no rank has measured anything.
    """
    plan = load_plan(require_run(run))
    prediction = plan.prediction
    rows: list[dict[str, Any]] = []
    for rank in range(plan.cluster.ranks):
        measured = read_memory(run, rank)
        if measured is None:
            continue
        pairs = [(name, prediction.of(name, "resident"), size) for name, size in measured.entries_bytes.items()]
        pairs = [pair for pair in pairs if pair[1] or pair[2]]
        pairs.append((RESIDENT, prediction.resident_bytes, measured.resident_bytes))
        for phase, size in measured.phase_peak_bytes.items():
            pairs.append((f"peak of {phase}", prediction.phase_peak_bytes[phase], size))
        pairs.append((PEAK, prediction.peak_bytes, measured.peak_bytes))
        rows += [dict(zip(COLUMNS, (rank, *pair, pair[1] / (pair[2] or float("nan"))), strict=True)) for pair in pairs]
    if not rows:
        raise InputError(f"{run}: holds no measurement: the run ended before its measured step")
    table: pd.DataFrame = pd.DataFrame(rows, columns=list(COLUMNS))
    return table


def metrics_of(run: Path) -> pd.DataFrame:
    """The run's metrics, a row per line of its metrics file; a torn last line is left out.

    Raises:
        InputError: if another line is no JSON object.
    """
    path = run / METRICS
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line))
        except ValueError:
            if number < len(lines):
                raise InputError(f"{path}: line {number} is not valid JSON") from None
    metrics: pd.DataFrame = pd.DataFrame(rows, columns=None if rows else ["event"])
    return metrics


def files_of(run: Path) -> dict[str, Path]:
    """Where the files of a run lie, by what they are; only those that exist."""
    paths = {"metrics": run / METRICS, "measured memory": run / "memory", "checkpoint": run / CHECKPOINT}
    return {name: path for name, path in paths.items() if path.exists()}
