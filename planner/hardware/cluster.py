"""The cluster of a plan: number of nodes and ranks, memory sizes, compute and transfer rates.

A cluster has a name: ``cpu:RANKS`` (this machine), ``8xH100`` (one node with 8 GPUs), ``2x8xH100`` (two such nodes),
``dgx-h100`` or ``2xdgx-h100`` (nodes of the catalog). Or a YAML or JSON file describes it, which may start from one of
these names: ``base: 2x8xH100``. Its section ``measured`` has the rates that `translution calibrate` measured.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import Field, TypeAdapter

from ..common.errors import InputError
from ..common.files import SPEC_SUFFIXES, read_mapping
from ..common.machine import total_memory_bytes, usable_cores
from ..common.schema import Schema, validate
from ..common.types import ByteCount, ByteRate, Line, Positive, Precision
from ..common.units import GIB
from .catalog import (
    GpuSpec,
    NodeSpec,
    OverheadOverrides,
    find_gpu,
    find_node,
    load_catalog,
    nearest_names,
    read_overrides,
)
from .device_overhead import DeviceOverhead, estimate_overhead

_DEFAULT_HOST_BYTES = 1024 * GIB


class ClusterSpec(Schema):
    """A set of equal nodes. Rates are peaks, per direction; None if unknown."""

    name: Line = "custom"
    device: Literal["cpu", "cuda"] = "cuda"
    """Device on which a rank computes; the device memory of a CPU rank is its share of the node's memory."""
    nodes: Positive = 1
    """Number of nodes."""
    ranks_per_node: Positive
    """Ranks per node: one per GPU, or one per CPU process."""
    device_memory_bytes: ByteCount
    """Bytes of memory of one rank's device, as its driver reports them."""
    host_memory_bytes: ByteCount = _DEFAULT_HOST_BYTES
    """Bytes of host memory of one node."""
    gpu: Line | None = None
    """Name of the GPU in the catalog."""
    bf16_flops_per_s: Rate | None = None
    """Dense bf16 FLOP/s of one device."""
    fp16_flops_per_s: Rate | None = None
    """Dense fp16 FLOP/s of one device."""
    tf32_flops_per_s: Rate | None = None
    """Dense TF32 FLOP/s of one device."""
    fp32_flops_per_s: Rate | None = None
    """Dense fp32 FLOP/s of one device."""
    memory_bytes_per_s: ByteRate | None = None
    """Memory bandwidth of one device."""
    intra_node_bytes_per_s: ByteRate | None = None
    """Bandwidth from one device to the others of its node."""
    pcie_bytes_per_s: ByteRate | None = None
    """Bandwidth between the host and one device."""
    host_cores: Positive | None = None
    """CPU cores of one node."""
    host_memory_bytes_per_s: ByteRate | None = None
    """Host memory bandwidth of one node."""
    nics: Positive | None = None
    """Network adapters of one node."""
    nic_bytes_per_s: ByteRate | None = None
    """Bandwidth of one network adapter."""
    nvme_bytes: ByteCount | None = None
    """Bytes of all NVMe drives of one node."""
    nvme_read_bytes_per_s: ByteRate | None = None
    """Read bandwidth of all NVMe drives of one node together."""
    nvme_write_bytes_per_s: ByteRate | None = None
    """Write bandwidth of all NVMe drives of one node together."""
    price_per_gpu_hour: Rate | None = None
    """Price of one GPU for one hour, in any currency."""
    gpu_constants: OverheadOverrides | None = None
    """This machine's own figures for the device overhead."""
    measured: MeasuredRates | None = None
    """Rates that `translution calibrate` measured; predictions use them instead of the peaks above."""

    @property
    def world_size(self) -> int:
        """Number of ranks, over which ZeRO partitions."""
        return self.nodes * self.ranks_per_node

    @property
    def has_fused_kernels(self) -> bool:
        """Whether the fused kernels of relations run on its GPUs: NVIDIA's of compute capability 8.0 or newer."""
        return self.gpu is not None and find_gpu(self.gpu)[1].generation in _FUSED_GENERATIONS

    def device_overhead(self, *, expandable_segments: bool = False, relation_ranks: int = 1) -> DeviceOverhead | None:
        """Return what a rank's GPU holds in addition to torch's tensors; None for CPU ranks.

        Args:
            expandable_segments: whether torch's allocator uses expandable segments.
            relation_ranks: ranks that share out the relations, G, which have communicators of their own.
        """
        if self.device == "cpu":
            return None
        return estimate_overhead(
            self.gpu,
            self.world_size,
            self.nodes,
            self.gpu_constants,
            expandable_segments=expandable_segments,
            relation_ranks=relation_ranks,
        )


_CLUSTER: TypeAdapter[ClusterSpec] = TypeAdapter(ClusterSpec)
_FIELDS = tuple(ClusterSpec.model_fields)
_GPU_RATES = ("bf16_flops_per_s", "fp16_flops_per_s", "tf32_flops_per_s", "fp32_flops_per_s", "memory_bytes_per_s")
_NODE_SHARES = ("host_memory_bytes", "host_cores", "nics", "nvme_bytes")
"""What a job on some of a node's GPUs gets in proportion; a GPU communicates through its own adapter."""
_NODE_BANDWIDTHS = ("host_memory_bytes_per_s", "nvme_read_bytes_per_s", "nvme_write_bytes_per_s")
"""What the ranks in use share among themselves, however many GPUs the node has."""
_NODE_RATES = ("intra_node_bytes_per_s", "pcie_bytes_per_s", "nic_bytes_per_s")
_FORMS = "must be cpu:RANKS, GPUSxNAME, NODESxGPUSxNAME, NODE, NODESxNODE or a YAML or JSON file"


def local_cpu_cluster(ranks: int) -> ClusterSpec:
    """Return a cluster of this machine with one process per rank; ranks share the memory equally.

    Raises:
        InputError: if ranks is below 1 or above the number of cores.
    """
    cores = usable_cores()
    if not 1 <= ranks <= cores:
        raise InputError(
            f"cluster: cpu:{ranks} is not allowed: ranks must be from 1 to {cores}, the cores of this machine"
        )
    memory = total_memory_bytes()
    return ClusterSpec(
        name=f"cpu:{ranks}",
        device="cpu",
        ranks_per_node=ranks,
        device_memory_bytes=memory // ranks,
        host_memory_bytes=memory,
        host_cores=cores,
    )


def _gpu_fields(name: str, gpu: GpuSpec) -> dict[str, Any]:
    rates = {field: rate.value for field in _GPU_RATES if (rate := getattr(gpu, field)) is not None}
    return {"gpu": name, "device_memory_bytes": gpu.memory_bytes.value} | rates


def _node_fields(node: NodeSpec, ranks_per_node: int) -> dict[str, Any]:
    """Return the figures of a node with ``ranks_per_node`` GPUs: a proportional share of its sizes and counts."""
    gpus = int(node.gpus.value)
    fields: dict[str, Any] = {field: getattr(node, field).value for field in _NODE_RATES}
    for field in _NODE_SHARES:
        fields[field] = max(1, getattr(node, field).value * ranks_per_node // gpus)
    for field in _NODE_BANDWIDTHS:
        fields[field] = getattr(node, field).value * max(1.0, ranks_per_node / gpus)
    return fields


def _gpu_cluster(nodes: int, ranks_per_node: int, gpu_name: str) -> dict[str, Any]:
    name, gpu = find_gpu(gpu_name, "cluster", load_catalog().nodes)
    return {
        "name": f"{nodes}x{ranks_per_node}x{name}",
        "nodes": nodes,
        "ranks_per_node": ranks_per_node,
        **_gpu_fields(name, gpu),
        **_node_fields(load_catalog().nodes[gpu.node], ranks_per_node),
    }


def _node_cluster(nodes: int, node_name: str) -> dict[str, Any]:
    name, node = find_node(node_name, "cluster")
    ranks_per_node = int(node.gpus.value)
    return {
        "name": f"{nodes}x{name}",
        "nodes": nodes,
        "ranks_per_node": ranks_per_node,
        **_gpu_fields(node.gpu, load_catalog().gpus[node.gpu]),
        **_node_fields(node, ranks_per_node),
    }


def named_cluster(name: str) -> ClusterSpec:
    """Return the cluster with a name.

    A node with fewer or more GPUs than the catalog's has a proportional share of its host memory, cores, network
    adapters and drives; fewer GPUs share the bandwidths of the whole node's memory and drives.

    Raises:
        InputError: if the name has another form, a GPU or node is unknown, or there are more CPU ranks than cores.
    """
    cpu = re.fullmatch(r"cpu:(\d{1,6})", name.lower(), re.ASCII)
    if cpu:
        return local_cpu_cluster(int(cpu[1]))
    node = re.fullmatch(r"(?:(\d{1,6})x)?(\w[\w.-]*)", name, re.ASCII)
    gpus = re.fullmatch(r"(?:(\d{1,6})x)?(\d{1,6})x([A-Za-z0-9-]+)", name, re.ASCII)
    known_nodes = {key.lower() for key in load_catalog().nodes}
    if node and node[2].lower() in known_nodes:
        data = _node_cluster(int(node[1] or 1), node[2])
    elif gpus:
        data = _gpu_cluster(int(gpus[1] or 1), int(gpus[2]), gpus[3])
    else:
        hint = nearest_names(name, (*load_catalog().nodes, *load_catalog().gpus))
        raise InputError(f"cluster: {name[:60]!r} is not allowed: {_FORMS}{hint}")
    return validate(_CLUSTER, data, f"cluster {name!r}", _FIELDS)


def _described_cluster(data: object, what: str, name: str) -> ClusterSpec:
    """Build a cluster from a mapping: the base's fields, then its GPU's, then the mapping's own.

    Args:
        data: the content of a cluster file.
        what: begins the error line.
        name: the cluster's name if the mapping gives a base but no name.
    """
    if not isinstance(data, Mapping):
        return validate(_CLUSTER, data, what, _FIELDS)
    own, start = dict(data), {}
    if "base" in own:
        base = own.pop("base")
        if not isinstance(base, str) or Path(base).suffix in SPEC_SUFFIXES:
            raise InputError(f"{what}: base: {base!r} is not allowed: must be the name of a cluster, such as 2x8xH100")
        start = named_cluster(base).model_dump() | {"name": name}
    if isinstance(own.get("gpu"), str):
        own["gpu"], gpu = find_gpu(own["gpu"], what)
        start |= _gpu_fields(own["gpu"], gpu)
    if isinstance(own.get("gpu_constants"), Mapping):
        own["gpu_constants"] = read_overrides(own["gpu_constants"], f"{what}: gpu_constants")
    return validate(_CLUSTER, start | own, what, ("base", *_FIELDS))


def load_cluster(source: ClusterSpec | Mapping[str, object] | str | Path) -> ClusterSpec:
    """Return a cluster spec.

    Args:
        source: a name (``"8xH100"``, ``"2xdgx-h100"``, ``"cpu:2"``), a YAML or JSON file, a mapping with the file's
            content, or a spec.

    Raises:
        InputError: if a name, GPU or node is unknown, there are more CPU ranks than cores, or the file is invalid.
    """
    if isinstance(source, ClusterSpec):
        return source
    if isinstance(source, Mapping):
        return _described_cluster(source, "cluster", "custom")
    path = Path(source)
    if path.suffix in SPEC_SUFFIXES:
        return _described_cluster(read_mapping(path), str(path), path.stem)
    return named_cluster(str(source))


Rate: TypeAlias = Annotated[float, Field(gt=0)]
"""Units per second."""
Seconds: TypeAlias = Annotated[float, Field(ge=0)]


class Transfer(Schema):
    """Linear transfer model: fixed latency plus bytes / bandwidth."""

    latency_s: Seconds
    bytes_per_s: Rate

    def seconds(self, size: float) -> float:
        """Return the time to transfer ``size`` bytes."""
        return self.latency_s + size / self.bytes_per_s


_FUSED_GENERATIONS = ("ampere", "ada", "hopper", "blackwell")


class MatmulRate(Schema):
    """Measured speed of a product (rows, width) by (width, width)."""

    precision: Precision
    rows: Annotated[int, Field(gt=0)]
    width: Annotated[int, Field(gt=0)]
    flops_per_s: Rate


class MeasuredRates(Schema):
    """Measured rates of one machine; None if a rate was not measured."""

    command: Line = ""
    """Command that measured the rates."""
    time_utc: Line = ""
    machine: Line = ""
    """Processor, number of cores, versions."""
    ranks: Annotated[int, Field(gt=0)] = 1
    """Number of ranks that ran at the same time while compute and collectives were measured."""
    matmul: tuple[MatmulRate, ...] = ()
    memory_bytes_per_s: Rate | None = None
    """Bytes per second that elementwise operations read and write, on tensors of 1 MB, the size of a relation's."""
    norm_elements_per_s: Rate | None = None
    """Elements per second of a gradient norm in fp64, as DeepSpeed computes it."""
    operation_s: Seconds | None = None
    """Seconds of one small tensor operation called from Python."""
    all_gather: Transfer | None = None
    """All-gather, by the bytes of the full tensor."""
    reduce_scatter: Transfer | None = None
    """Reduce-scatter, by the bytes of the full tensor."""
    all_reduce: Transfer | None = None
    """All-reduce, by the bytes of the full tensor."""
    host_to_device: Transfer | None = None
    """Copy from the host to one device."""
    device_to_host: Transfer | None = None
    """Copy from one device to the host."""
    host_adam_elements_per_s: Rate | None = None
    """Elements per second that DeepSpeed's CPU AdamW updates on one rank while all ranks run it."""
    device_adam_elements_per_s: Rate | None = None
    """Elements per second that torch's AdamW updates."""
    nvme_read_bytes_per_s: Rate | None = None
    """NVMe read rate of all ranks of a node together, through DeepSpeed's I/O library."""
    nvme_write_bytes_per_s: Rate | None = None
    """NVMe write rate of all ranks of a node together, through DeepSpeed's I/O library."""
    module_s: Seconds | None = None
    """Seconds of ZeRO-3's hooks around one module, forward and backward, without the collectives."""
    gradient_s: Seconds | None = None
    """Seconds of the engine's work on one parameter's gradient, without the collectives."""
    sub_group_s: Seconds | None = None
    """Seconds of ZeRO-3's step of one sub-group, without the update itself."""


def interpolate(points: Sequence[MatmulRate], rows: float, width: float) -> float:
    """Interpolate the FLOP/s of a product (rows, width) by (width, width) between measured points.

    Interpolation is linear in the logarithms: along rows at the two nearest measured widths, then between the widths.
    Outside of the measured range the nearest value holds.

    Args:
        points: measured products of one precision; at least one.
        rows: rows of the left matrix.
        width: geometric mean of the right matrix's sides.
    """
    widths = sorted({point.width for point in points})
    low = max((w for w in widths if w <= width), default=widths[0])
    high = min((w for w in widths if w >= width), default=widths[-1])
    ends = []
    for each in (low, high):
        column = sorted((point.rows, point.flops_per_s) for point in points if point.width == each)
        ends.append(_along(column, rows))
    return math.exp(_between(math.log(low), math.log(high), math.log(ends[0]), math.log(ends[1]), math.log(width)))


def _along(column: Sequence[tuple[int, float]], rows: float) -> float:
    before = max((pair for pair in column if pair[0] <= rows), default=column[0])
    after = min((pair for pair in column if pair[0] >= rows), default=column[-1])
    logs = [math.log(value) for value in (before[0], after[0], before[1], after[1], rows)]
    return math.exp(_between(*logs))


def _between(x0: float, x1: float, y0: float, y1: float, x: float) -> float:
    if x1 <= x0:
        return y0
    fraction = min(1.0, max(0.0, (x - x0) / (x1 - x0)))
    return y0 + fraction * (y1 - y0)
