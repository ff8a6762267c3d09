"""Measured memory of a rank, as stored in the run folder."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, TypeAdapter

from translution.planner.common import Schema, parse_json

from .folder import memory_path


class MemoryMeasurement(Schema):
    """Bytes of memory that one rank measured in one training step."""

    rank: int
    device: Literal["cpu", "cuda"]
    step: int
    entries_bytes: dict[str, int]
    """Bytes of live device tensors between two steps, by kind."""
    resident_bytes: int
    """Bytes of all live device tensors between two steps; 0 if only the process was recorded."""
    phase_peak_bytes: dict[str, int]
    """Peak bytes of live device tensors in each phase of the step."""
    peak_bytes: int
    """Peak bytes of live device tensors in the step."""
    process_peak_bytes: int
    """Peak resident bytes of the process so far, including libraries."""
    host_entries_bytes: dict[str, int] = Field(default_factory=dict)
    """Bytes of live host tensors between two steps, by kind; empty on a CPU."""
    swap_buffers_bytes: dict[str, int] = Field(default_factory=dict)
    """Bytes of locked NVMe buffers, by kind; otherwise counted only in the process's and ``locked_bytes``."""
    locked_bytes: int = 0
    """Bytes of the process that are locked (mlock) between two steps."""
    pinned_bytes: int = 0
    """Bytes of the process that a driver has pinned between two steps."""
    disk_bytes: dict[str, int] = Field(default_factory=dict)
    """Bytes of this rank's files on NVMe between two steps, by kind."""
    saved_bytes: int | None = None
    """Bytes that one micro-batch's forward pass saves for backward, without parameters."""
    reserved_bytes: int | None = None
    """Peak bytes that torch had reserved from the driver in the step; None on a CPU."""
    device_used_bytes: int | None = None
    """Highest bytes of the device in use by all processes, as the driver reports them after each phase; None on a
    CPU."""
    process_start_bytes: int = 0
    """Resident bytes of the process before the model is built: libraries, data and the process group."""
    process_phase_peak_bytes: dict[str, int] = Field(default_factory=dict)
    """Peak resident bytes of the process in each phase, including libraries."""


_MEMORY: TypeAdapter[MemoryMeasurement] = TypeAdapter(MemoryMeasurement)


def read_memory(run: Path, rank: int) -> MemoryMeasurement | None:
    """Return a rank's measurement, or None if it has not written one."""
    path = memory_path(run, rank)
    return parse_json(_MEMORY, path.read_bytes(), str(path)) if path.exists() else None


def remove_measurements(run: Path) -> None:
    """Remove the ranks' measurements, because the run continues with another layout."""
    for path in memory_path(run, 0).parent.glob("rank_*.json"):
        path.unlink()
