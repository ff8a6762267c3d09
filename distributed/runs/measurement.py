"""The measured memory of a rank, as its run folder stores it."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, TypeAdapter

from translution.planner.common.schema import Schema, parse_json

from .folder import memory_path


class MemoryMeasurement(Schema):
    """Bytes measured by one rank in one training step."""

    rank: int
    device: Literal["cpu", "cuda"]
    step: int
    entries_bytes: dict[str, int]
    """Live tensors between two steps, told apart."""
    resident_bytes: int
    """All live tensors between two steps."""
    phase_peak_bytes: dict[str, int]
    """Highest sum of live memory within each phase of the step."""
    peak_bytes: int
    """The highest of them."""
    process_peak_bytes: int
    """Highest resident set of the process so far, libraries included."""
    host_entries_bytes: dict[str, int] = Field(default_factory=dict)
    """Live tensors in host memory between two steps, where the device has memory of its own."""
    swap_buffers_bytes: dict[str, int] = Field(default_factory=dict)
    """Locked buffers for NVMe, which are in no other figure but the process's and ``locked_bytes``."""
    locked_bytes: int = 0
    """Memory of the process that is locked (mlock), between two steps."""
    pinned_bytes: int = 0
    """Memory of the process that a driver has pinned, between two steps."""
    disk_bytes: dict[str, int] = Field(default_factory=dict)
    """Files of this rank on NVMe between two steps, by what they hold."""
    saved_bytes: int | None = None
    """What one micro-batch's forward keeps for backward, parameters left out."""
    process_start_bytes: int = 0
    """Resident set before the model was made: libraries, data and the process group."""
    process_phase_peak_bytes: dict[str, int] = Field(default_factory=dict)
    """Highest resident set within each phase, libraries included."""


_MEMORY: TypeAdapter[MemoryMeasurement] = TypeAdapter(MemoryMeasurement)


def read_memory(run: Path, rank: int) -> MemoryMeasurement | None:
    """A rank's measurement, or None if it never wrote one."""
    path = memory_path(run, rank)
    return parse_json(_MEMORY, path.read_bytes(), str(path)) if path.exists() else None


def remove_measurements(run: Path) -> None:
    """Remove what ranks measured before the run took on another layout."""
    for path in memory_path(run, 0).parent.glob("rank_*.json"):
        path.unlink()
