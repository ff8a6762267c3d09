"""Predicted against measured: the memory of every rank of a run, in one table."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from translution.distributed.runs.folder import CHECKPOINT, METRICS, RUNS, require_run, status_path
from translution.distributed.runs.measurement import MemoryMeasurement, read_memory
from translution.planner.common.errors import InputError
from translution.planner.memory.estimate import MemoryEstimate, estimate_memory
from translution.planner.plans.plan import Plan, load_plan
from translution.planner.simulator.core.tiers import Tier
from translution.planner.simulator.engine.base import STATES
from translution.planner.simulator.lifecycle import INIT, RESUME

_COLUMNS = ("rank", "tier", "what", "predicted_bytes", "measured_bytes", "ratio")
RESIDENT, SAVED, PROCESS_PREFIX = "between steps", "kept for backward", "process"
PROCESS_GROWTH_BYTES = 40 * 2**20
"""What a process loads after it has begun to be watched: DeepSpeed's engine, gloo's threads, kernels. Measured."""
_SWAP_ITEMS = {"exp_avg": STATES, "exp_avg_sq": STATES}
"""Entries of the ledger that files on NVMe belong to, where the file has another name."""


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


def predicted_and_measured(
    prediction: MemoryEstimate, measured: MemoryMeasurement
) -> Iterator[tuple[Tier, str, int, int]]:
    """Tier, what, predicted and measured bytes: entries that can be told apart, then totals."""
    own: Tier = prediction.own_tier
    for name, size in measured.entries_bytes.items():
        yield own, name, prediction.of(name), size
    for name, size in measured.host_entries_bytes.items():
        kinds: tuple[Tier, ...] = ("host", "pinned")
        yield "host", name, sum(prediction.of(name, RESIDENT, tier) for tier in kinds), size
    for name, size in measured.swap_buffers_bytes.items():
        yield "pinned", name, prediction.of(name, RESIDENT, "pinned"), size
    files: dict[str, int] = {}
    for name, size in measured.disk_bytes.items():
        entry = _SWAP_ITEMS.get(name, name)
        files[entry] = files.get(entry, 0) + size
    for name, size in files.items():
        yield "nvme", name, prediction.of(name, RESIDENT, "nvme"), size
    yield own, RESIDENT, prediction.resident_bytes, measured.resident_bytes
    if measured.saved_bytes is not None:
        yield own, SAVED, prediction.saved_bytes, measured.saved_bytes
    for phase, size in _with_building(measured.phase_peak_bytes).items():
        yield own, f"peak of {phase}", prediction.bytes_of(phase), size
    for phase, size in _with_building(measured.process_phase_peak_bytes).items():
        held = prediction.bytes_of(phase, "host") + prediction.bytes_of(phase, "pinned")
        yield "host", f"{PROCESS_PREFIX} in {phase}", measured.process_start_bytes + PROCESS_GROWTH_BYTES + held, size


def _with_building(peaks: Mapping[str, int]) -> dict[str, int]:
    """Peaks of the phases, where resuming has made the engine before it has read the checkpoint."""
    if RESUME in peaks and INIT in peaks:
        return {**peaks, RESUME: max(peaks[INIT], peaks[RESUME])}
    return dict(peaks)


def predict_rank(plan: Plan, rank: int) -> MemoryEstimate:
    """The plan's, which is of the rank with the most; at stages 1 and 2 that of the rank itself."""
    if plan.zero.stage not in (1, 2):
        return plan.prediction
    return estimate_memory(plan.model, plan.cluster, plan.training, plan.zero, plan.tile_relations, rank)


def compare_run(run: Path) -> pd.DataFrame:
    """Predicted and measured bytes of every rank, with the columns of `_COLUMNS`.

    Entries that can be told apart come first, then what is live between steps, what is kept for
    backward and the peak of each phase. The process's resident memory is predicted as what it was
    before the model was made, `PROCESS_GROWTH_BYTES`, and what the ledger adds. ``ratio`` is predicted
    over measured; what was measured as nought has none.

    Raises:
        InputError: if it is no run folder, or no rank has measured anything.
    """
    plan = load_plan(require_run(run))
    rows: list[dict[str, Any]] = []
    for rank in range(plan.cluster.world_size):
        measured = read_memory(run, rank)
        if measured is None:
            continue
        for tier, what, predicted, size in predicted_and_measured(predict_rank(plan, rank), measured):
            if predicted or size:
                values = (rank, tier, what, predicted, size, predicted / (size or float("nan")))
                rows.append(dict(zip(_COLUMNS, values, strict=True)))
    if not rows:
        raise InputError(f"{run}: holds no measurement: the run ended before its measured step")
    table: pd.DataFrame = pd.DataFrame(rows, columns=list(_COLUMNS))
    return table


def read_metrics(run: Path) -> pd.DataFrame:
    """The run's metrics, a row per line of its metrics file; a torn last line is left out.

    Of steps that a resumed run did again, the last time counts.

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
    if "step" in metrics:
        again = (metrics["event"] == "step") & metrics.duplicated(["event", "step"], keep="last")
        metrics = metrics[~again].reset_index(drop=True)
    return metrics


def run_files(run: Path) -> dict[str, Path]:
    """Where the files of a run lie, by what they are; only those that exist."""
    paths = {"metrics": run / METRICS, "measured memory": run / "memory", "checkpoint": run / CHECKPOINT}
    return {name: path for name, path in paths.items() if path.exists()}
