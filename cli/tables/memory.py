"""The memory breakdown as tables: the peak of every phase and tier, and the items of each tier's peak."""

from __future__ import annotations

from collections.abc import Iterator

from rich.table import Table

from translution.planner.common.phases import Phase, Tier
from translution.planner.common.units import format_bytes
from translution.planner.memory.estimate import MemoryEstimate

from ..output import make_table


def phase_table(title: str, prediction: MemoryEstimate) -> Table:
    """Return the peak of each tier in each phase."""
    tiers = prediction.tiers
    rows = [
        (
            phase,
            *(format_bytes(prediction.bytes_of(phase, tier)) if prediction.peak(phase, tier) else "" for tier in tiers),
        )
        for phase in Phase
    ]
    return make_table(title, ("phase", *tiers), rows)


def peak_tables(prediction: MemoryEstimate, tiers: tuple[Tier, ...] = ()) -> Iterator[Table]:
    """Yield one table per tier with the items of its highest peak."""
    for tier in tiers or prediction.tiers:
        worst = max((peak for peak in prediction.peaks if peak.tier == tier), key=lambda peak: peak.bytes)
        rows = [(entry.name, entry.formula, entry.source, format_bytes(entry.bytes)) for entry in worst.breakdown]
        where = f"{tier}: {format_bytes(worst.bytes)} in {worst.phase}, at {worst.site}"
        if tier == "device" and prediction.device_interval_bytes:
            low, high = map(format_bytes, prediction.device_interval_bytes)
            where += f"; {low} to {high} depending on the device overhead"
        yield make_table(where, ("item", "formula", "source", "size"), rows, text_columns=3)
