"""The record of ``scripts/gpu_check.py``: ``gpu_check.json`` in the folder of its results."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, TypeVar

from pydantic import Field, TypeAdapter

from translution.planner.common import InputError, Provenance, Schema, parse_json, stored_as, validate

from ..render.document import read_input

GPU_RECORD = "gpu_check.json"


class GpuPart(Schema):
    """How one part of the check ended, and what it found."""

    name: str
    state: Literal["ok", "failed", "timed out", "not run", "stopped"]
    seconds: float
    limit_seconds: float
    line: str
    """Its key figures."""
    output: tuple[str, ...] = ()
    """The last lines that it printed, if it did not end well."""
    data: dict[str, object]
    made: Provenance | None = None
    """How it was made; None if as the whole check."""


class GpuCheck(Schema):
    """The whole check."""

    schema_version: Literal[1]
    device: Literal["cpu", "cuda"]
    small: bool
    """True for a rehearsal with tiny sizes."""
    card: dict[str, str]
    """What the driver reports of the card."""
    host_memory_bytes: int
    made: Provenance
    seconds: float
    parts: tuple[GpuPart, ...]

    def part(self, name: str) -> GpuPart | None:
        """Return a part by its name."""
        return next((part for part in self.parts if part.name == name), None)


class KernelRow(Schema):
    """Time of all calls of one kernel in a step."""

    kernel: str
    calls: int
    seconds: float


class WayRow(Schema):
    """Time and memory of one way to compute a layer."""

    way: str
    seconds: float | None = None
    forward_seconds: float | None = None
    backward_seconds: float | None = None
    peak_bytes: int | None = None
    kernels: tuple[KernelRow, ...] = ()
    error: str = ""


class LayerRow(Schema):
    """The ways to compute one layer; the first is what a GPU uses."""

    case: str
    batch: int
    ways: tuple[WayRow, ...] = ()
    products: str = ""
    seconds: float | None = None
    operations: int | None = None
    matmul_rate_share: float | None = None
    times_attention: float | None = None
    peak_bytes: int | None = None
    gather_seconds: float | None = None
    gather_peak_bytes: int | None = None
    times_faster: float | None = None
    times_smaller: float | None = None
    error: str = ""


class TuningRow(Schema):
    """Time of one configuration of a fused kernel; None if the card lacks the resources."""

    kernel: str
    constants: str
    widths: tuple[int, ...]
    size_class: int
    rows: int
    inner: int
    columns: int
    warps: int
    stages: int
    registers: int | None
    seconds: float | None


class NetworkRow(Schema):
    """Time of forward and backward of a block or a network."""

    operator: str
    implementation: str
    module: str = ""
    batch: int | None = None
    seconds: float | None = None
    error: str = ""


class GpuOperators(Schema):
    """What the part "operators" found."""

    device: str = ""
    cuda: str | None = None
    parity: float | None = None
    half_parity: float | None = None
    matmul_size: int | None = None
    matmul_flop_per_s: float | None = None
    results: tuple[LayerRow, ...] = ()
    tuning: tuple[TuningRow, ...] = ()
    networks: tuple[NetworkRow, ...] = ()


class OverheadRow(Schema):
    """What a first use adds to the memory in use, to what torch reserved and to what it allocated."""

    what: str
    device_bytes: int | None
    reserved_bytes: int
    allocated_bytes: int


class PhaseBytes(Schema):
    """Predicted and measured bytes that torch allocated in a phase."""

    predicted_bytes: int
    measured_bytes: int


class PlanMemoryRow(Schema):
    """Predicted and measured memory of one plan."""

    name: str
    model: str
    offload: str
    error: str = ""
    micro_batch: int | None = None
    parameters: int | None = None
    process_seconds: float | None = None
    first_step_seconds: float | None = None
    step_seconds: float | None = None
    fastest_seconds: float | None = None
    slowest_seconds: float | None = None
    losses: tuple[float, ...] = ()
    predicted_allocated_bytes: int | None = None
    predicted_reserved_bytes: int | None = None
    predicted_device_bytes: int | None = None
    predicted_interval_bytes: tuple[int, int] | None = None
    predicted_host_bytes: int | None = None
    used_before_bytes: int | None = None
    allocated_bytes: int | None = None
    reserved_bytes: int | None = None
    device_used_bytes: int | None = None
    own_device_bytes: int | None = None
    """Bytes in use on the card less those in use before the rank started."""
    process_peak_bytes: int | None = None
    entries_bytes: dict[str, int] = Field(default_factory=dict)
    host_entries_bytes: dict[str, int] = Field(default_factory=dict)
    phases: dict[str, PhaseBytes] = Field(default_factory=dict)


class GpuMemory(Schema):
    """What the part "memory" found."""

    overhead: tuple[OverheadRow, ...] = ()
    overhead_error: str = ""
    cluster: dict[str, object] = Field(default_factory=dict)
    plans: tuple[PlanMemoryRow, ...] = ()


class PlanTimeRow(Schema):
    """Step time of one plan: likely, low and high from the catalog and from the measured rates, and measured."""

    name: str
    step_seconds: float | None
    fastest_seconds: float | None
    slowest_seconds: float | None
    catalog: tuple[float, float, float] | None = stored_as("catalog_s")
    calibrated: tuple[float, float, float] | None = stored_as("calibrated_s")
    error: str = ""


class GpuTimes(Schema):
    """What the part "times" found."""

    rates: dict[str, object] = Field(default_factory=dict)
    plans: tuple[PlanTimeRow, ...] = ()


class RateRow(Schema):
    """A rate, or why it could not be measured."""

    what: str
    unit: str
    per_second: float | None
    error: str


class GpuTransfers(Schema):
    """What the part "transfers" found."""

    rates: tuple[RateRow, ...] = ()


class LargestRow(Schema):
    """A run of the largest model."""

    depth: int
    parameters: int
    stage: int
    global_batch: int
    steps: int
    step_seconds: float | None
    predicted_step_seconds: float | None
    samples_per_s: float | None
    first_step_seconds: float | None
    process_seconds: float
    predicted_device_bytes: int
    allocated_bytes: int | None
    reserved_bytes: int | None
    device_used_bytes: int | None
    process_peak_bytes: int | None
    first_loss: float | None
    last_loss: float | None
    fell: bool
    error: str


class GpuLargest(Schema):
    """What the part "largest" found."""

    ladder: tuple[dict[str, object], ...] = ()
    runs: tuple[LargestRow, ...] = ()


_Data = TypeVar("_Data", bound=Schema)


def part_data(check: GpuCheck, name: str, kind: type[_Data]) -> _Data:
    """Return what a part found; nothing if it was not run.

    Args:
        check: the record.
        name: name of the part.
        kind: class of its findings.

    Raises:
        InputError: if a finding is unknown or invalid.
    """
    part = check.part(name)
    return validate(TypeAdapter(kind), {} if part is None else part.data, f"{GPU_RECORD}: {name}", ())


def load_gpu_check(folder: Path) -> GpuCheck | None:
    """Read the record of a folder; return None if it has none yet.

    Raises:
        InputError: if there is no such folder, the record is invalid, or it is a rehearsal, which shows nothing about
            a GPU.
    """
    if not folder.is_dir():
        raise InputError(
            f"--gpu: {str(folder)!r} is not allowed: must be a folder, with {GPU_RECORD} once there is one"
        )
    path = folder / GPU_RECORD
    if not path.exists():
        return None
    found = parse_json(TypeAdapter(GpuCheck), read_input(path), str(path))
    if found.device != "cuda":
        raise InputError(f"{path}: device: {found.device!r} is not allowed: must be cuda: this is a rehearsal on a CPU")
    if found.small:
        raise InputError(f"{path}: small: True is not allowed: must be False: this is a rehearsal with tiny sizes")
    return found
