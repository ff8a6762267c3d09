"""The memory ledger as tables: phases by tiers, and the worst moment of each tier entry by entry."""

from __future__ import annotations

from collections.abc import Iterator

from rich.table import Table

from translution.planner.common.phases import Phase, Tier
from translution.planner.common.units import format_bytes
from translution.planner.memory.estimate import MemoryEstimate

from ..output import table


def phase_table(title: str, prediction: MemoryEstimate) -> Table:
    """The most that each tier holds in each phase."""
    tiers = prediction.tiers
    rows = [
        (
            phase,
            *(format_bytes(prediction.bytes_of(phase, tier)) if prediction.peak(phase, tier) else "" for tier in tiers),
        )
        for phase in Phase
    ]
    return table(title, ("phase", *tiers), rows)


def worst_moments(prediction: MemoryEstimate, tiers: tuple[Tier, ...] = ()) -> Iterator[Table]:
    """A table for each tier, of what it holds at its worst moment."""
    for tier in tiers or prediction.tiers:
        worst = max((peak for peak in prediction.peaks if peak.tier == tier), key=lambda peak: peak.bytes)
        rows = [(entry.name, entry.formula, entry.source, format_bytes(entry.bytes)) for entry in worst.breakdown]
        where = f"{tier}: {format_bytes(worst.bytes)} in {worst.phase}, at {worst.site}"
        if tier == "device" and prediction.device_interval_bytes:
            low, high = map(format_bytes, prediction.device_interval_bytes)
            where += f"; {low} to {high} as the GPU's constants may be"
        yield table(where, ("what", "how it is counted", "source", "size"), rows, text_columns=3)
