"""What the reports read of a plan's prediction: the ledger of entries and the timeline of every tier.

Nothing else in the reports knows what form a prediction has.
"""

from __future__ import annotations

from typing import Any

from translution.planner.memory.estimate import BACKWARD, FORWARD, STEP, MemoryEstimate
from translution.planner.memory.timeline import Event, Timeline, make_timeline
from translution.planner.plans.plan import Plan
from translution.planner.simulator.lifecycle import simulate

DEVICE, HOST = "device", "host"
TIER_NAMES = {"pinned": "pinned host", "nvme": "NVMe"}
"""In words, where they differ from the tier's own name."""
_STEP = (FORWARD, BACKWARD, STEP)


def breakdown_rows(prediction: MemoryEstimate) -> list[dict[str, Any]]:
    """Every entry at the peak of every phase and tier.

    Returns:
        Mappings of ``tier``, ``phase``, ``peak_bytes`` and ``moment`` (of that phase on that tier), and
        the entry's ``name``, ``bytes``, ``formula`` and ``source``.
    """
    return [
        {"tier": peak.tier, "phase": peak.phase, "peak_bytes": peak.bytes, "moment": peak.site} | entry.model_dump()
        for peak in prediction.peaks
        for entry in peak.breakdown
    ]


def tier_name(tier: str) -> str:
    """A tier in words."""
    return TIER_NAMES.get(tier, tier)


def timelines_of(plan: Plan) -> dict[str, Timeline]:
    """What is live on each tier over one training step, whose peak is the prediction's.

    What the ledger holds beside the replayed tensors, such as a GPU's context, is there throughout.
    """
    memory = simulate(plan.model, plan.cluster, plan.training, plan.zero, plan.tile_relations, record=True).memory
    result: dict[str, Timeline] = {}
    for tier, recorded in memory.tiers.items():
        events: list[Event] = []
        initial: dict[str, int] = {}
        for event in recorded.events or []:
            phase, _, what, size = event
            if phase in _STEP:
                events.append(event)
            elif not events:
                initial[what] = initial.get(what, 0) + size
        worst = max((plan.prediction.peak(phase, tier) for phase in _STEP), key=lambda peak: peak.bytes if peak else 0)
        replayed = {what for _, _, what, _ in recorded.events or []}
        for entry in worst.breakdown if worst is not None else ():
            if entry.name not in replayed:
                initial[entry.name] = entry.bytes
        if any(initial.values()) or events:
            result[tier] = make_timeline(events, {what: size for what, size in initial.items() if size})
    return result
