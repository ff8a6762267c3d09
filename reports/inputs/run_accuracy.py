"""Predicted and measured memory of every rank of a run, and the metrics and files of the run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from translution.distributed.runs import CHECKPOINT, METRICS, MemoryMeasurement, read_memory, require_run
from translution.planner.common import InputError, Phase, Tier, read_json
from translution.planner.memory import MemoryEstimate, estimate_memory
from translution.planner.plans import Plan, load_plan, with_evaluation
from translution.planner.simulator.engine import OPTIMIZER_STATES

_COLUMNS = ("rank", "tier", "what", "predicted_bytes", "measured_bytes", "ratio")
RESIDENT, SAVED, PROCESS_PREFIX = "between steps", "saved for backward", "process"
"""Labels of rows: total live bytes between steps, bytes saved for backward, and the prefix for the process's memory."""
RESERVED, DEVICE_USED = "reserved by torch", "in use on the device"
"""Labels of rows of a GPU: what torch reserved from the driver, and what the driver reports for all processes."""
_OLD_LABELS = {"kept for backward": SAVED}
PROCESS_START_GROWTH_BYTES, PROCESS_GROWTH_BYTES, PROCESS_OFFLOAD_GROWTH_BYTES = 60 * 2**20, 88 * 2**20, 104 * 2**20
"""Bytes by which a process grows after its first measurement, besides tensors and buffers: until the engine is built or
has loaded a checkpoint; later; and later with offloaded parameters. They are DeepSpeed's engine and ops, threads,
kernels, and what Python and glibc keep of small blocks. Upper bounds; with 130 sub-groups 55, 84 and 100
MiB were measured."""
_SWAP_ITEMS = {"exp_avg": OPTIMIZER_STATES, "exp_avg_sq": OPTIMIZER_STATES}
"""Item of the memory breakdown that a file on NVMe belongs to, for files of another name."""


def current_label(label: str) -> str:
    """Return the present form of a row's label in a record of an earlier version."""
    return _OLD_LABELS.get(label, label)


def predicted_and_measured(
    prediction: MemoryEstimate, measured: MemoryMeasurement, *, offloads_parameters: bool = False
) -> Iterator[tuple[Tier, str, int, int]]:
    """Yield tier, label, predicted bytes and measured bytes: items measured separately, then totals."""
    later = PROCESS_OFFLOAD_GROWTH_BYTES if offloads_parameters else PROCESS_GROWTH_BYTES
    own = prediction.own_tier
    for name, size in measured.entries_bytes.items():
        yield own, name, prediction.of(name), size
    for name, size in measured.host_entries_bytes.items():
        predicted = sum(prediction.of(name, RESIDENT, tier) for tier in (Tier.HOST, Tier.PINNED))
        yield Tier.HOST, name, predicted, size
    for name, size in measured.swap_buffers_bytes.items():
        yield Tier.PINNED, name, prediction.of(name, RESIDENT, Tier.PINNED), size
    files: dict[str, int] = {}
    for name, size in measured.disk_bytes.items():
        entry = _SWAP_ITEMS.get(name, name)
        files[entry] = files.get(entry, 0) + size
    for name, size in files.items():
        yield Tier.NVME, name, prediction.of(name, RESIDENT, Tier.NVME), size
    if measured.resident_bytes:
        yield own, RESIDENT, prediction.allocated_bytes_of(Phase.BETWEEN), measured.resident_bytes
    if measured.saved_bytes is not None:
        yield own, SAVED, prediction.saved_bytes, measured.saved_bytes
    for phase, size in _with_building(measured.phase_peak_bytes).items():
        yield own, f"peak of {phase}", prediction.allocated_bytes_of(phase), size
    yield from _device_totals(prediction, measured)
    for phase, size in _with_building(measured.process_phase_peak_bytes).items():
        held = prediction.bytes_of(phase, Tier.HOST) + prediction.bytes_of(phase, Tier.PINNED)
        held += PROCESS_START_GROWTH_BYTES if phase in (Phase.INIT, Phase.RESUME) else later
        yield Tier.HOST, f"{PROCESS_PREFIX} in {phase}", measured.process_start_bytes + held, size


def _device_totals(prediction: MemoryEstimate, measured: MemoryMeasurement) -> Iterator[tuple[Tier, str, int, int]]:
    """Yield the highest bytes that torch reserved, and that the driver reports as in use, in a step on a GPU."""
    worst = prediction.worst(Tier.DEVICE)
    if worst is None:
        return
    # Although there was room for what torch caches, one H200 had reserved 3% more than was allocated (reports/gpu).
    if measured.reserved_bytes is not None:
        yield Tier.DEVICE, RESERVED, worst.reserved_bytes, measured.reserved_bytes
    if measured.device_used_bytes is not None:
        # The driver's own reserve is not in the total that it reports to a process.
        yield Tier.DEVICE, DEVICE_USED, worst.bytes - worst.of("driver reserve"), measured.device_used_bytes


def _with_building(peaks: Mapping[str, int]) -> dict[str, int]:
    """Return the peaks by phase; resuming includes building the engine, so its peak is at least that of init."""
    if Phase.RESUME in peaks and Phase.INIT in peaks:
        return {**peaks, Phase.RESUME: max(peaks[Phase.INIT], peaks[Phase.RESUME])}
    return dict(peaks)


def predict_rank(plan: Plan, rank: int) -> MemoryEstimate:
    """Return the prediction for a rank: its own where ranks differ, else the plan's, which is for the largest rank."""
    if plan.zero.stage not in (1, 2) and plan.parallel.relation == 1:
        return plan.prediction
    return with_evaluation(plan.run_config, estimate_memory(plan.run_config, rank), plan.evaluation, rank)


def compare_run(run: Path) -> pd.DataFrame:
    """Return predicted and measured bytes of every rank: rank, tier, what, predicted_bytes, measured_bytes, ratio.

    Items measured separately come first, then the bytes live between steps, the bytes saved for backward and the peak
    of each phase. The predicted resident memory of the process is its size before the model was built, plus
    `PROCESS_GROWTH_BYTES`, plus the predicted host memory. ``ratio`` is predicted over measured, NaN if the measured
    value is zero.

    Raises:
        InputError: if this is not a run folder, or no rank has measured its memory.
    """
    plan = load_plan(require_run(run))
    rows: list[dict[str, Any]] = []
    for rank in range(plan.cluster.world_size):
        measured = read_memory(run, rank)
        if measured is None:
            continue
        offloads = plan.zero.offload_param.device != "none"
        rows_of_rank = predicted_and_measured(predict_rank(plan, rank), measured, offloads_parameters=offloads)
        for tier, what, predicted, size in rows_of_rank:
            if predicted or size:
                values = (rank, tier, what, predicted, size, predicted / (size or float("nan")))
                rows.append(dict(zip(_COLUMNS, values, strict=True)))
    if not rows:
        raise InputError(f"{run}: holds no measurement: the run ended before its measured step")
    table: pd.DataFrame = pd.DataFrame(rows, columns=list(_COLUMNS))
    return table


def read_metrics(run: Path) -> pd.DataFrame:
    """Return the run's metrics, one row per line of its metrics file; an incomplete last line is ignored.

    For steps that a resumed run repeated, the last row is returned.

    Raises:
        InputError: if another line is not valid JSON, or lacks its event.
    """
    path = run / METRICS
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(_checked_row(read_json(line, f"{path}: line {number}"), f"{path}: line {number}"))
        except InputError:
            if number < len(lines):
                raise
    metrics: pd.DataFrame = pd.DataFrame(rows, columns=None if rows else ["event"])
    if "step" in metrics:
        repeated = (metrics["event"] == "step") & metrics.duplicated(["event", "step"], keep="last")
        metrics = metrics[~repeated].reset_index(drop=True)
    return metrics


def _checked_row(row: object, what: str) -> dict[str, Any]:
    if not isinstance(row, dict) or not isinstance(row.get("event"), str):
        raise InputError(f"{what}: event: is required, the kind of the line as text")
    return row


def run_files(run: Path) -> dict[str, Path]:
    """Return the existing files and folders of a run by their description."""
    paths = {"metrics": run / METRICS, "measured memory": run / "memory", "checkpoint": run / CHECKPOINT}
    return {name: path for name, path in paths.items() if path.exists()}
