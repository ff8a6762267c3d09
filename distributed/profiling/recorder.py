"""Measuring a rank phase by phase: init, forward, backward, optimizer step, checkpoint save."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import torch

from translution.planner.common.phases import TRAINING_PHASES, Phase
from translution.planner.plans.plan import Plan

from ..data.base import Samples
from ..profiling import allocation_tracer as measure
from ..runs.measurement import MemoryMeasurement
from ..system import nvme_swap, process_memory
from .engine_tensors import swap_buffers, zero_entries

RunPhase = Any
"""Called with a phase's name and what it does, ``(str, () -> None) -> None``."""


def run_phase(name: str, work: Callable[[], None]) -> None:
    """Do a phase's work and measure nothing."""
    work()


Watch: TypeAlias = Literal["allocations", "process"]


class Recorder:
    """What one rank measures of itself: torch's allocations, or the process's resident memory.

    One or the other, because watching allocations takes memory too.

    Args:
        plan: gives the device and the NVMe path.
        rank: which rank this is.
        watch: what to measure.
    """

    def __init__(self, plan: Plan, rank: int, watch: Watch = "allocations") -> None:
        self.device: Literal["cpu", "cuda"] = plan.cluster.device
        self.watch = watch
        self._path = plan.zero.offload_optimizer.nvme_path or plan.zero.offload_param.nvme_path
        self._rank = rank
        self._peaks: dict[str, int] = {}
        self._process_peaks: dict[str, int] = {}
        if watch == "process":
            measure.load_libraries()
        self._start = process_memory.process_bytes().get("resident", 0)
        self._kept: measure.KeptCounter | None = None
        self._network: torch.nn.Module | None = None
        self._before: int | None = None
        self._base: int | None = None
        """Allocated before the model was made: the data set, and what libraries keep."""

    def record(self, name: str, work: Callable[[], None]) -> None:
        """Do a phase's work and note the most of what is watched; a phase met again keeps its higher peak."""
        if self.watch == "allocations":
            self._record_allocations(name, work)
            return
        process_memory.reset_peak()
        work()
        self._process_peaks[name] = max(self._process_peaks.get(name, 0), process_memory.process_bytes()["peak"])

    def _record_allocations(self, name: str, work: Callable[[], None]) -> None:
        if self.device == "cpu":
            with measure.settled_collectives():
                before, peak = measure.trace_allocations(work)
        else:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            work()
            peak = torch.cuda.max_memory_allocated()
        if self._base is None:
            self._base = before
        if self._before is None:
            self._before = before
        self._peaks[name] = max(self._peaks.get(name, 0), peak)

    def counted(self, name: str, work: Callable[[], None]) -> None:
        """Do a phase's work; the first forward pass is counted for what it keeps."""
        if name != Phase.FORWARD or self._network is None:
            work()
            return
        # A later micro-batch would be given the addresses of the first one's tensors again.
        self._kept, self._network = measure.KeptCounter(self._network), None
        with self._kept.counting():
            work()

    def count_kept(self, network: torch.nn.Module) -> None:
        """Count what the next forward pass under `counted` keeps for backward."""
        self._network = network

    def between_steps(self, engine: Any, samples: list[torch.Tensor], batches: list[Samples]) -> Between:
        """Tell apart what is alive now.

        Args:
            engine: DeepSpeed's.
            samples: the data set, which stands in for a data loader and is no part of the state.
            batches: micro-batches of the coming step.
        """
        self._before = None
        device = torch.device(self.device).type
        counter = measure.StorageCounter()
        counter.add(samples)
        named = zero_entries(engine) | {
            "micro-batches": [tensor for batch in batches for tensor in (batch.inputs, batch.targets)]
        }
        entries, on_host = {}, {}
        for name, tensors in named.items():
            real = [tensor for tensor in tensors if isinstance(tensor, torch.Tensor)]
            entries[name] = counter.add(tensor for tensor in real if tensor.device.type == device)
            if device != "cpu":
                on_host[name] = counter.add(tensor for tensor in real if tensor.device.type == "cpu")
        buffers = {name: counter.add(tensors) for name, tensors in swap_buffers(engine).items()}
        process = process_memory.process_bytes()
        return Between(entries, on_host, buffers, process, nvme_swap.disk_bytes(self._path, self._rank))

    def add_to(self, measurement: MemoryMeasurement) -> MemoryMeasurement:
        """An earlier measurement with this process's phases beside or in place of its own."""
        base = self._base or 0
        peaks = {name: peak - base for name, peak in self._peaks.items()}
        changes: dict[str, Any] = {"phase_peak_bytes": measurement.phase_peak_bytes | peaks}
        if self.watch == "process":
            changes |= {"process_start_bytes": self._start, "process_phase_peak_bytes": self._process_peaks}
        return measurement.model_copy(update=changes)

    def measurement(self, step: int, between: Between) -> MemoryMeasurement:
        """Everything measured, in the form of a run's files."""
        base = self._base or 0
        resident = (self._before or 0) - base
        peaks = {name: peak - base for name, peak in self._peaks.items()}
        entries = between.entries | {"other": resident - sum(between.entries.values())}
        return MemoryMeasurement(
            rank=self._rank,
            device=self.device,
            step=step,
            entries_bytes=entries,
            resident_bytes=resident,
            phase_peak_bytes=peaks,
            peak_bytes=max(peaks[name] for name in TRAINING_PHASES),
            process_peak_bytes=between.process["peak"],
            host_entries_bytes=between.on_host,
            swap_buffers_bytes={name: size for name, size in between.buffers.items() if size},
            locked_bytes=between.process.get("locked", 0),
            pinned_bytes=between.process.get("pinned", 0),
            disk_bytes=between.disk,
            saved_bytes=None if self._kept is None else self._kept.total_bytes,
        )


class Between:
    """What was alive between two steps."""

    def __init__(
        self,
        entries: dict[str, int],
        on_host: dict[str, int],
        buffers: dict[str, int],
        process: dict[str, int],
        disk: dict[str, int],
    ) -> None:
        self.entries, self.on_host, self.buffers = entries, on_host, buffers
        self.process, self.disk = process, disk
