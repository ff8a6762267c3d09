"""The parts of a plan's prediction that reports show: the memory breakdown and the timeline of every tier.

No other module of the reports depends on the structure of a prediction.
"""

from __future__ import annotations

from typing import Any

from translution.planner.common import TRAINING_PHASES, Tier
from translution.planner.memory import MemoryEstimate, Timeline, make_timeline
from translution.planner.plans import Plan
from translution.planner.simulator import Event, simulate

_TIER_NAMES = {Tier.PINNED: "pinned host", Tier.NVME: "NVMe"}
"""Display names of tiers that differ from the tier's own name."""


def breakdown_rows(prediction: MemoryEstimate) -> list[dict[str, Any]]:
    """Return every item of the memory breakdown at the peak of every phase and tier.

    Returns:
        Mappings of ``tier``, ``phase``, ``peak_bytes`` and ``site`` (of the phase's peak on that tier), and the item's
        ``name``, ``bytes``, ``formula`` and ``source``.
    """
    return [
        {"tier": peak.tier, "phase": peak.phase, "peak_bytes": peak.bytes, "site": peak.site} | entry.model_dump()
        for peak in prediction.peaks
        for entry in peak.breakdown
    ]


def tier_name(tier: str) -> str:
    """Return the display name of a tier."""
    return _TIER_NAMES.get(Tier(tier), tier)


def timelines_of(plan: Plan) -> dict[str, Timeline]:
    """Return the timeline of each tier over one training step; its peak equals the prediction's.

    Items of the breakdown other than replayed tensors, such as the GPU's context, are live throughout.
    """
    memory = simulate(plan.run_config, record=True).memory
    result: dict[str, Timeline] = {}
    for tier, recorded in memory.tiers.items():
        events: list[Event] = []
        initial: dict[str, int] = {}
        for event in recorded.events or []:
            phase, _, what, size = event
            if phase in TRAINING_PHASES:
                events.append(event)
            elif not events:
                initial[what] = initial.get(what, 0) + size
        peaks = (plan.prediction.peak(phase, tier) for phase in TRAINING_PHASES)
        worst = max(peaks, key=lambda peak: peak.bytes if peak else 0)
        replayed = {what for _, _, what, _ in recorded.events or []}
        for entry in worst.breakdown if worst is not None else ():
            if entry.name not in replayed:
                initial[entry.name] = entry.bytes
        if any(initial.values()) or events:
            result[tier] = make_timeline(events, {what: size for what, size in initial.items() if size})
    return result
