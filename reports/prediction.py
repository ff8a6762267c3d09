"""What the reports read of a plan's prediction: the ledger of entries and the timeline of every tier.

Nothing else in the reports knows what form a prediction has.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from translution.planner.memory import MemoryEstimate
from translution.planner.plan import Plan
from translution.planner.schedule import MICRO_BATCHES, replay
from translution.planner.tape import Memory
from translution.planner.timeline import Event, Timeline, make_timeline
from translution.planner.twins import WEIGHT_GRADIENTS, Widths

DEVICE, HOST = "device", "host"
TIER_NAMES = {"pinned": "pinned host", "nvme": "NVMe"}
"""In words, where they differ from the tier's own name."""
_RESIDENT, _STEP, _PASS = "resident", "optimizer step", "forward and backward"
_REPLAYED = ("activations kept", "activations of the moment")


def ledger_rows(prediction: MemoryEstimate) -> list[dict[str, Any]]:
    """Every entry at the peak of every phase and tier.

    Returns:
        Mappings of ``tier``, ``phase``, ``peak_bytes`` and ``moment`` (of that phase on that tier), and
        the entry's ``name``, ``bytes``, ``formula`` and ``source``.
    """
    return [
        {"tier": DEVICE, "phase": phase, "peak_bytes": peak, "moment": ""}
        | {"name": entry.name, "bytes": entry.bytes, "formula": entry.formula, "source": entry.source}
        for phase, peak in prediction.phase_peak_bytes.items()
        for entry in prediction.entries
        if entry.phase in (_RESIDENT, phase)
    ]


class _PhasedMemory(Memory):
    """Remembers in which phase every event was."""

    def __init__(self, ignored: frozenset[str]) -> None:
        super().__init__(record=True, ignored=ignored)
        self._starts: list[tuple[int, str]] = []

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """As in `Memory`."""
        assert self.events is not None
        self._starts.append((len(self.events), name))
        with super().phase(name):
            yield

    def phased(self) -> Iterator[Event]:
        """The events of the phases, in order."""
        assert self.events is not None
        ends = [*(start for start, _ in self._starts[1:]), len(self.events)]
        for (start, name), end in zip(self._starts, ends, strict=True):
            for moment, what, size in self.events[start:end]:
                yield name, moment, what, size


def tier_name(tier: str) -> str:
    """A tier in words."""
    return TIER_NAMES.get(tier, tier)


def timelines_of(plan: Plan) -> dict[str, Timeline]:
    """What is live on each tier over one step, whose peaks are the prediction's.

    Activations are replayed; what else a phase needs lives from its beginning to its end.
    """
    entries = plan.prediction.entries
    memory = _PhasedMemory(frozenset({WEIGHT_GRADIENTS, MICRO_BATCHES}))
    widths = Widths.of(plan.training.dtype_bytes, plan.cluster.device)
    replay(plan.model, plan.training.micro_batch, widths, memory=memory)
    held = [entry for entry in entries if entry.phase == _PASS and entry.name not in _REPLAYED]
    step = [entry for entry in entries if entry.phase == _STEP]
    events: list[Event] = [("forward", "begin", entry.name, entry.bytes) for entry in held]
    events += memory.phased()
    events += [("backward", "end", entry.name, -entry.bytes) for entry in held]
    events += [(_STEP, "begin", entry.name, entry.bytes) for entry in step]
    events += [(_STEP, "end", entry.name, -entry.bytes) for entry in step]
    initial: dict[str, int] = {}
    for entry in entries:
        if entry.phase == _RESIDENT:
            initial[entry.name] = initial.get(entry.name, 0) + entry.bytes
    return {DEVICE: make_timeline(events, initial)}
