"""The section that lays a memory snapshot of torch over the prediction of a plan."""

from __future__ import annotations

from pathlib import Path

from translution.planner.common import TRAINING_PHASES, InputError, Phase, Provenance, Tier, format_bytes
from translution.planner.memory import NOT_ALLOCATED
from translution.planner.plans import Plan

from ..charts.memory_timeline import draw_measured
from ..inputs.prediction import timelines_of
from ..inputs.torch_snapshot import TorchSnapshot, read_snapshot
from ..render.document import CellValue, Column, Picture, Section, Table

MAX_STEPS = 100
"""Largest number of steps that a snapshot is laid over."""


def _predicted_line(plan: Plan, steps: int) -> list[tuple[float, int]]:
    """Return the bytes that torch should count as allocated, over a number of equal steps."""
    timeline = timelines_of(plan)[Tier.DEVICE]
    counted = [number for number, name in enumerate(timeline.categories) if name not in NOT_ALLOCATED]
    one = [
        (point.first_event / timeline.event_count, sum(point.live_bytes[number] for number in counted))
        for point in timeline.points
    ]
    line = [((step + x) / steps, size) for step in range(steps) for x, size in one]
    return [*line, (1.0, line[-1][1])]


def _rows(plan: Plan, snapshot: TorchSnapshot) -> list[tuple[CellValue, ...]]:
    prediction = plan.prediction
    worst = prediction.worst(Tier.DEVICE)
    pairs = {
        "allocated, highest": (
            max(prediction.allocated_bytes_of(phase) for phase in TRAINING_PHASES), snapshot.timeline.peak_bytes,
        ),
        "allocated when the recording began": (prediction.allocated_bytes_of(Phase.BETWEEN), snapshot.start_bytes),
        "allocated when the snapshot was taken": (prediction.allocated_bytes_of(Phase.BETWEEN), snapshot.end_bytes),
        "reserved by torch": (0 if worst is None else worst.reserved_bytes, snapshot.reserved_bytes),
    }  # fmt: skip
    return [(name, *pair, pair[0] / pair[1] if pair[1] else None) for name, pair in pairs.items()]


def snapshot_section(plan: Plan, path: Path, steps: int, made: Provenance) -> Section:
    """Return the section with what torch's allocator recorded on a GPU, and the prediction over it.

    Args:
        plan: the plan that was recorded.
        path: file of ``torch.cuda.memory._dump_snapshot``, or the same content as JSON.
        steps: number of optimizer steps that were recorded.
        made: provenance of the report.

    Raises:
        InputError: if the file is invalid, the plan is not for GPUs, or the number of steps is out of range.
    """
    if plan.cluster.device != "cuda":
        raise InputError(f"--snapshot: is not allowed with a plan for {plan.cluster.name}: must be of a plan for GPUs")
    if not 1 <= steps <= MAX_STEPS:
        raise InputError(f"--snapshot-steps: {steps} is not allowed: must be between 1 and {MAX_STEPS}")
    snapshot = read_snapshot(path)
    recorded = f"{steps} step{'s' if steps > 1 else ''}, GPU {snapshot.device}"
    spec = draw_measured(
        snapshot.timeline,
        _predicted_line(plan, steps),
        "Memory that torch allocated",
        recorded,
        plan.cluster.device_memory_bytes,
    )
    picture = Picture(
        key="snapshot",
        caption=f"Areas: bytes that torch had allocated in {path.name}, by the code that asked for them. Line: the "
        "prediction. Both have their allocations and releases in order, each over the whole width.",
        name="Allocated memory, measured and predicted",
        spec=spec,
        narrow=True,
        how="Drawn by",
        made=made,
    )
    table = Table(
        key="snapshot-table",
        caption="Predicted memory, and the snapshot's",
        text="A torch without expandable segments reserves more than it allocates; a snapshot counts requested bytes.",
        columns=(
            Column(title="item"),
            Column(title="predicted", kind="bytes"),
            Column(title="snapshot", kind="bytes"),
            Column(title="predicted / snapshot", kind="ratio"),
        ),
        rows=tuple(_rows(plan, snapshot)),
        sortable=False,
        how="Drawn by",
        made=made,
    )
    text = "What torch's allocator recorded. Memory of the driver, NCCL and other libraries is not in it."
    failed = snapshot.failed_bytes
    notes = () if failed is None else (f"The last allocation that failed asked for {format_bytes(failed)}.",)
    return Section(
        key="snapshot-section", title="Snapshot of torch's memory", text=(text, *notes), parts=(picture, table)
    )
