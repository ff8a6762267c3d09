"""Measures a rank's memory phase by phase: init, forward, backward, optimizer step, checkpoint save, resume."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch

from translution.planner.common import TRAINING_PHASES, Phase
from translution.planner.plans import Plan

from ..data.base import Samples
from ..runs.measurement import MemoryMeasurement
from ..system import nvme_swap, process_memory
from .allocation_tracer import SavedTensorCounter, StorageCounter, load_libraries, trace_allocations
from .engine_tensors import swap_buffers, tensors_by_item

RunPhase: TypeAlias = Callable[[str, Callable[[], None]], None]
"""Called with the name and the work of a phase."""
MemoryKind: TypeAlias = Literal["allocations", "process"]
"""What is recorded: torch's allocations, or the resident memory of the process."""


def run_phase(name: str, work: Callable[[], None]) -> None:
    """Do the work of a phase without measuring it."""
    work()


@dataclass(frozen=True)
class StateSnapshot:
    """What is allocated between two steps, in bytes."""

    entries: dict[str, int]
    """Tensors on the device by breakdown item."""
    host_entries: dict[str, int]
    """Tensors in host memory by breakdown item, where the device has memory of its own."""
    swap_buffers: dict[str, int]
    """Locked buffers for NVMe."""
    process: dict[str, int]
    """Resident, peak, locked and pinned memory of the process."""
    disk: dict[str, int]
    """Files on NVMe by content."""


class Recorder:
    """Measures one rank: torch's allocations or the process's resident memory.

    It records only one of them, because tracing allocations takes memory itself.

    Args:
        plan: gives the device and the NVMe path.
        rank: number of the rank.
        memory_kind: what is recorded.
        while_tracing: context in which CPU allocations are traced.
    """

    def __init__(
        self,
        plan: Plan,
        rank: int,
        memory_kind: MemoryKind = "allocations",
        while_tracing: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext,
        swap_folder: Path | None = None,
    ) -> None:
        self.device: Literal["cpu", "cuda"] = plan.cluster.device
        self.memory_kind = memory_kind
        self._while_tracing = while_tracing
        self._swap_folder = swap_folder
        self._rank = rank
        self._peaks: dict[str, int] = {}
        self._process_peaks: dict[str, int] = {}
        self._reserved: dict[str, int] = {}
        self._device_used: dict[str, int] = {}
        if memory_kind == "process":
            load_libraries()
        self._process_start = process_memory.process_bytes().get("resident", 0)
        self._saved: SavedTensorCounter | None = None
        self._network: torch.nn.Module | None = None
        self._before: int | None = None
        """Bytes allocated at the start of the first phase recorded after the newest snapshot."""
        self._base: int | None = None
        """Bytes allocated before the model was made: the data set and what libraries hold."""

    def record(self, name: str, work: Callable[[], None]) -> None:
        """Do the work of a phase and record its peak; repeated phases keep the highest."""
        if self.memory_kind == "allocations":
            self._record_allocations(name, work)
            return
        process_memory.reset_peak()
        work()
        self._process_peaks[name] = max(self._process_peaks.get(name, 0), process_memory.process_bytes()["peak"])

    def _record_allocations(self, name: str, work: Callable[[], None]) -> None:
        if self.device == "cpu":
            with self._while_tracing():
                before, peak = trace_allocations(work)
        else:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            work()
            peak = torch.cuda.max_memory_allocated()
            self._record_device(name)
        if self._base is None:
            self._base = before
        if self._before is None:
            self._before = before
        self._peaks[name] = max(self._peaks.get(name, 0), peak)

    def _record_device(self, name: str) -> None:
        """Record what torch has reserved and what the driver says is in use; torch returns nothing between phases."""
        free, total = torch.cuda.mem_get_info()
        for highest, size in ((self._reserved, torch.cuda.max_memory_reserved()), (self._device_used, total - free)):
            highest[name] = max(highest.get(name, 0), size)

    def expect_saved_tensors(self, network: torch.nn.Module) -> None:
        """Let the next forward pass under `count_saved_tensors` count what it saves for backward."""
        self._network = network

    def count_saved_tensors(self, name: str, work: Callable[[], None]) -> None:
        """Do the work of a phase; in the first forward pass, count the bytes saved for backward."""
        if name != Phase.FORWARD or self._network is None:
            work()
            return
        # Later micro-batches are not counted: they reuse the addresses of the first one's tensors.
        self._saved, self._network = SavedTensorCounter(self._network), None
        with self._saved.counting():
            work()

    def take_snapshot(self, engine: Any, data_tensors: list[torch.Tensor], batches: list[Samples]) -> StateSnapshot:
        """Assign what is allocated now to breakdown items.

        Args:
            engine: DeepSpeed's engine.
            data_tensors: tensors of the data set, which are not part of the training state.
            batches: micro-batches of the next step.
        """
        self._before = None
        device = torch.device(self.device).type
        counter = StorageCounter()
        counter.add(data_tensors)
        named = tensors_by_item(engine) | {
            "micro-batches": [tensor for batch in batches for tensor in (batch.inputs, batch.targets)]
        }
        entries, host_entries = {}, {}
        for name, tensors in named.items():
            real = [tensor for tensor in tensors if isinstance(tensor, torch.Tensor)]
            entries[name] = counter.add(tensor for tensor in real if tensor.device.type == device)
            if device != "cpu":
                host_entries[name] = counter.add(tensor for tensor in real if tensor.device.type == "cpu")
        return StateSnapshot(
            entries=entries,
            host_entries=host_entries,
            swap_buffers={name: counter.add(tensors) for name, tensors in swap_buffers(engine).items()},
            process=process_memory.process_bytes(),
            disk=nvme_swap.disk_bytes(self._swap_folder),
        )

    def _peaks_above_base(self) -> dict[str, int]:
        return {name: peak - (self._base or 0) for name, peak in self._peaks.items()}

    def add_to(self, measurement: MemoryMeasurement) -> MemoryMeasurement:
        """Return an earlier measurement with the phases of this process added or replaced."""
        changes: dict[str, Any] = {"phase_peak_bytes": measurement.phase_peak_bytes | self._peaks_above_base()}
        if self.memory_kind == "process":
            earlier, own = measurement.process_phase_peak_bytes, self._process_peaks
            peaks = {name: max(earlier.get(name, 0), own.get(name, 0)) for name in {**earlier, **own}}
            changes |= {"process_start_bytes": self._process_start, "process_phase_peak_bytes": peaks}
        return measurement.model_copy(update=changes)

    def measurement(self, step: int, snapshot: StateSnapshot) -> MemoryMeasurement:
        """Return everything measured, as a run folder stores it."""
        resident = (self._before or 0) - (self._base or 0)
        peaks = self._peaks_above_base()
        # The total is unknown where only the process is recorded.
        other = {} if self._before is None else {"other": resident - sum(snapshot.entries.values())}
        return MemoryMeasurement(
            rank=self._rank,
            device=self.device,
            step=step,
            entries_bytes=snapshot.entries | other,
            resident_bytes=resident,
            phase_peak_bytes=peaks,
            peak_bytes=max(peaks.get(name, 0) for name in TRAINING_PHASES),
            reserved_bytes=max(self._reserved.get(name, 0) for name in TRAINING_PHASES) or None,
            device_used_bytes=max(self._device_used.get(name, 0) for name in TRAINING_PHASES) or None,
            process_peak_bytes=snapshot.process["peak"],
            host_entries_bytes=snapshot.host_entries,
            swap_buffers_bytes={name: size for name, size in snapshot.swap_buffers.items() if size},
            locked_bytes=snapshot.process.get("locked", 0),
            pinned_bytes=snapshot.process.get("pinned", 0),
            disk_bytes=snapshot.disk,
            saved_bytes=None if self._saved is None else self._saved.total_bytes,
        )
