"""Section on a GPU: what ``scripts/gpu_check.py`` measured there, or that nothing was measured yet."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ..inputs.gpu_record import (
    GpuCheck,
    GpuLargest,
    GpuMemory,
    GpuOperators,
    GpuTimes,
    GpuTransfers,
    PlanMemoryRow,
    PlanTimeRow,
    part_data,
)
from ..render.document import CellValue, Column, ColumnKind, Section, Table

NOT_MEASURED = (
    "Not yet measured on a GPU. python scripts/gpu_check.py measures parity, operators, memory, time, the largest "
    "model that trains, and transfers within eight minutes on one card; this section then shows its results."
)
KEY = "gpu-section"


def _ratio(predicted: float | None, measured: float | None) -> float | None:
    return predicted / measured if predicted and measured else None


def _table(
    check: GpuCheck,
    key: str,
    caption: str,
    columns: Sequence[tuple[str, ColumnKind]],
    rows: Sequence[tuple[CellValue, ...]],
    text: str | None = None,
) -> Table:
    titles = tuple(Column(title=title, kind=kind) for title, kind in columns)
    return Table(
        key=key, caption=caption, text=text, columns=titles, rows=tuple(rows), how="Measured by", made=check.made
    )


def _parts_table(check: GpuCheck) -> Table:
    rows = [
        (part.name, (part.made or check.made).time_utc[:10], part.state, part.seconds, part.line or None)
        for part in check.parts
    ]
    columns: list[tuple[str, ColumnKind]] = [
        ("part", "text"),
        ("date", "text"),
        ("ended", "text"),
        ("time", "seconds"),
        ("found", "sentence"),
    ]
    return _table(check, "gpu-parts", "Parts of the check", columns, rows)


def _operators(check: GpuCheck) -> Iterator[Table]:
    found = part_data(check, "operators", GpuOperators)
    rows = [
        (row.case, row.batch, way.way, way.forward_seconds, way.backward_seconds, way.peak_bytes, way.error or None)
        for row in found.results
        for way in row.ways
    ]
    columns: list[tuple[str, ColumnKind]] = [
        ("layer", "text"), ("batch", "integer"), ("way", "text"), ("forward", "seconds"), ("backward", "seconds"),
        ("peak", "bytes"), ("error", "sentence"),
    ]  # fmt: skip
    text = None
    if found.matmul_flop_per_s:
        text = f"One product of two {found.matmul_size}² matrices runs at {found.matmul_flop_per_s / 1e12:.1f} TFLOP/s."
    if rows:
        yield _table(check, "gpu-operators", "One layer in bf16, forward and backward", columns, rows, text)
    yield from _networks(check, found)


def _networks(check: GpuCheck, found: GpuOperators) -> Iterator[Table]:
    rows = [
        (row.module or None, row.batch, row.operator, row.implementation, row.seconds, row.error or None)
        for row in found.networks
    ]
    columns: list[tuple[str, ColumnKind]] = [
        ("module", "text"), ("batch", "integer"), ("operator", "text"), ("implementation", "text"),
        ("forward and backward", "seconds"), ("error", "sentence"),
    ]  # fmt: skip
    if rows:
        yield _table(check, "gpu-networks", "A block and a network of two layers in bf16", columns, rows)


def _plan_sizes(row: PlanMemoryRow) -> tuple[CellValue, ...]:
    pairs = (
        (row.predicted_allocated_bytes, row.allocated_bytes),
        (row.predicted_reserved_bytes, row.reserved_bytes),
        (row.predicted_device_bytes, row.own_device_bytes),
    )
    sizes = [size for predicted, measured in pairs for size in (predicted, measured, _ratio(predicted, measured))]
    return (row.name, *sizes, row.error or None)


def _memory(check: GpuCheck) -> Iterator[Table]:
    found = part_data(check, "memory", GpuMemory)
    if found.overhead:
        columns: list[tuple[str, ColumnKind]] = [
            ("first use", "text"), ("in use on the card", "bytes"), ("reserved by torch", "bytes"),
            ("allocated by torch", "bytes"),
        ]  # fmt: skip
        rows = [(row.what, row.device_bytes, row.reserved_bytes, row.allocated_bytes) for row in found.overhead]
        text = "Each row is what that use adds, in a process that has used nothing before."
        yield _table(check, "gpu-overhead", "What a GPU holds besides tensors", columns, rows, text)
    if found.plans:
        kinds = ("allocated", "reserved", "on the card")
        columns = [("plan", "text")]
        for kind in kinds:
            columns += [(f"{kind}, predicted", "bytes"), (f"{kind}, measured", "bytes"), ("ratio", "ratio")]
        columns.append(("error", "sentence"))
        text = "Peaks of a training step of one rank; on the card counts the context and what NCCL holds."
        sizes = [_plan_sizes(row) for row in found.plans]
        yield _table(check, "gpu-memory", "Predicted and measured memory", columns, sizes, text)


def _plan_times(row: PlanTimeRow) -> tuple[CellValue, ...]:
    step, low, high = row.step_seconds, row.fastest_seconds, row.slowest_seconds
    measured: CellValue = None if step is None else (step, low or step, high or step)
    ratios = [_ratio(time[0] if time else None, step) for time in (row.catalog, row.calibrated)]
    return (row.name, row.catalog, ratios[0], row.calibrated, ratios[1], measured)


def _times(check: GpuCheck) -> Iterator[Table]:
    found = part_data(check, "times", GpuTimes)
    columns: list[tuple[str, ColumnKind]] = [
        ("plan", "text"), ("from the catalog (interval)", "seconds"), ("catalog / measured", "ratio"),
        ("from measured rates (interval)", "seconds"), ("rates / measured", "ratio"),
        ("measured (fastest to slowest)", "seconds"),
    ]  # fmt: skip
    if found.plans:
        rows = [_plan_times(row) for row in found.plans]
        yield _table(check, "gpu-times", "Predicted and measured time of a step", columns, rows)


def _largest(check: GpuCheck) -> Iterator[Table]:
    found = part_data(check, "largest", GpuLargest)
    columns: list[tuple[str, ColumnKind]] = [
        ("layers", "integer"), ("parameters", "count"), ("ZeRO stage", "integer"), ("batch", "integer"),
        ("steps", "integer"), ("step, predicted", "seconds"), ("step, measured", "seconds"),
        ("samples per second", "number"), ("allocated", "bytes"), ("on the card", "bytes"), ("first loss", "number"),
        ("last loss", "number"), ("error", "sentence"),
    ]  # fmt: skip
    rows = [
        (
            row.depth, row.parameters, row.stage, row.global_batch, row.steps, row.predicted_step_seconds,
            row.step_seconds, row.samples_per_s, row.allocated_bytes, row.device_used_bytes, row.first_loss,
            row.last_loss, row.error or None,
        )
        for row in found.runs
    ]  # fmt: skip
    if rows:
        text = "Full Translution of ViT-Base/16's width on the samples of one step, which it learns by heart."
        yield _table(check, "gpu-largest", "The largest model that trains on this machine", columns, rows, text)


def _transfers(check: GpuCheck) -> Iterator[Table]:
    found = part_data(check, "transfers", GpuTransfers)
    units = {"B": "GB", "parameters": "G parameters"}
    rows = [
        (row.what, None if row.per_second is None else row.per_second / 1e9, units.get(row.unit, row.unit), row.error)
        for row in found.rates
    ]
    columns: list[tuple[str, ColumnKind]] = [
        ("what", "text"),
        ("per second", "number"),
        ("unit", "text"),
        ("error", "sentence"),
    ]
    if rows:
        yield _table(check, "gpu-transfers", "Optimizers, copies and the drive", columns, rows)


def gpu_section(check: GpuCheck | None) -> Section:
    """Return the section on a GPU.

    Args:
        check: record of ``scripts/gpu_check.py``; None if there is none yet.

    Raises:
        InputError: if a part's findings are invalid.
    """
    title = "On a GPU"
    if check is None:
        return Section(key=KEY, title=title, text=(NOT_MEASURED,))
    tables = [_parts_table(check)]
    for make in (_operators, _memory, _times, _largest, _transfers):
        tables += make(check)
    card = check.card
    name = f"{card.get('name', 'a GPU')}, driver {card.get('driver_version', 'unknown')}"
    text = f"One {name}, clocks at the start {card.get('clocks.sm', '?')} MHz of {card.get('clocks.max.sm', '?')} MHz."
    return Section(key=KEY, title=title, text=(text,), parts=tuple(tables))
