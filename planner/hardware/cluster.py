"""Where a plan runs: nodes, ranks per node, the memory of each and what joins them.

A cluster is named ``cpu:RANKS`` (this machine), ``8xH100`` (one node of eight), ``2x8xH100`` (two nodes
of eight), ``dgx-h100`` or ``2xdgx-h100`` (nodes of the catalog), or described in a YAML or JSON file,
which may start from any of these names: ``base: 2x8xH100``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter

from ..common.errors import InputError
from ..common.files import SPEC_SUFFIXES, read_mapping
from ..common.machine import total_memory_bytes, usable_cores
from ..common.schema import Schema, validate
from ..common.units import GIB
from ..config.model import Positive
from .calibrated_rates import MeasuredRates, Rate
from .catalog import GpuSpec, NodeSpec, catalog, find_gpu, find_node, nearest_names
from .device_overhead import DeviceOverhead, device_overhead
from .intervals import OverheadOverrides, read_overrides

_DEFAULT_HOST_BYTES = 1024 * GIB


class ClusterSpec(Schema):
    """A set of equal nodes. Rates are peaks, per direction; None where nobody said."""

    name: str = "custom"
    device: Literal["cpu", "cuda"] = "cuda"
    """What a rank computes on; a CPU rank's device memory is its share of the node's memory."""
    nodes: Positive = 1
    ranks_per_node: Positive
    """One rank per GPU, or per CPU process."""
    device_memory_bytes: Positive
    """Memory of one rank's device, as its driver reports it."""
    host_memory_bytes: Positive = _DEFAULT_HOST_BYTES
    """Memory of one node beside the devices."""
    gpu: str | None = None
    """Its name in the catalog."""
    bf16_flops_per_s: Rate | None = None
    fp16_flops_per_s: Rate | None = None
    tf32_flops_per_s: Rate | None = None
    fp32_flops_per_s: Rate | None = None
    """Of one device, dense; likewise the other three."""
    memory_bytes_per_s: Rate | None = None
    """Of one device's memory."""
    intra_node_bytes_per_s: Rate | None = None
    """From one device to the others of its node."""
    pcie_bytes_per_s: Rate | None = None
    """Between the host and one device."""
    host_cores: Positive | None = None
    """Of one node; likewise what follows."""
    host_memory_bytes_per_s: Rate | None = None
    nics: Positive | None = None
    nic_bytes_per_s: Rate | None = None
    """Of one network adapter."""
    nvme_bytes: Positive | None = None
    nvme_read_bytes_per_s: Rate | None = None
    nvme_write_bytes_per_s: Rate | None = None
    """Of all drives together."""
    price_per_gpu_hour: Rate | None = None
    """In whatever currency the user counts."""
    gpu_constants: OverheadOverrides | None = None
    """This machine's own figures of what a device holds beside torch's tensors."""
    measured: MeasuredRates | None = None
    """What `translution calibrate` measured; the rates above are peaks."""

    @property
    def world_size(self) -> int:
        """Ranks in all, the ZeRO partition world size."""
        return self.nodes * self.ranks_per_node

    def device_overhead(self, *, expandable_segments: bool = False) -> DeviceOverhead | None:
        """What a rank's GPU holds beside torch's tensors; None for CPU ranks.

        Args:
            expandable_segments: as torch's allocator is set.
        """
        if self.device == "cpu":
            return None
        return device_overhead(
            self.gpu, self.world_size, self.nodes, self.gpu_constants, expandable_segments=expandable_segments
        )


_CLUSTER: TypeAdapter[ClusterSpec] = TypeAdapter(ClusterSpec)
_FIELDS = tuple(ClusterSpec.model_fields)
_GPU_RATES = ("bf16_flops_per_s", "fp16_flops_per_s", "tf32_flops_per_s", "fp32_flops_per_s", "memory_bytes_per_s")
_NODE_SHARES = (
    "host_memory_bytes",
    "host_cores",
    "host_memory_bytes_per_s",
    "nics",
    "nvme_bytes",
    "nvme_read_bytes_per_s",
    "nvme_write_bytes_per_s",
)
_NODE_RATES = ("intra_node_bytes_per_s", "pcie_bytes_per_s", "nic_bytes_per_s")
_FORMS = "must be cpu:RANKS, GPUSxNAME, NODESxGPUSxNAME, NODE, NODESxNODE or a YAML or JSON file"


def local_cpu_cluster(ranks: int) -> ClusterSpec:
    """This machine, with one process per rank, each with an equal share of its memory.

    Raises:
        InputError: for fewer ranks than 1 or more than there are cores.
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
    rates = {field: getattr(gpu, field).value for field in _GPU_RATES}
    return {"gpu": name, "device_memory_bytes": gpu.memory_bytes.value} | rates


def _node_fields(node: NodeSpec, ranks_per_node: int) -> dict[str, Any]:
    """Figures of a node with so many GPUs: a proportional share, at least one of what is counted."""
    fields: dict[str, Any] = {field: getattr(node, field).value for field in _NODE_RATES}
    for field in _NODE_SHARES:
        whole, gpus = getattr(node, field).value, int(node.gpus.value)
        if isinstance(whole, int):
            fields[field] = max(1, whole * ranks_per_node // gpus)
        else:
            fields[field] = whole * ranks_per_node / gpus
    return fields


def _gpu_cluster(nodes: int, ranks_per_node: int, gpu_name: str) -> dict[str, Any]:
    name, gpu = find_gpu(gpu_name, "cluster", catalog().nodes)
    return {
        "name": f"{nodes}x{ranks_per_node}x{name}",
        "nodes": nodes,
        "ranks_per_node": ranks_per_node,
        **_gpu_fields(name, gpu),
        **_node_fields(catalog().nodes[gpu.node], ranks_per_node),
    }


def _node_cluster(nodes: int, node_name: str) -> dict[str, Any]:
    name, node = find_node(node_name, "cluster")
    ranks_per_node = int(node.gpus.value)
    return {
        "name": f"{nodes}x{name}",
        "nodes": nodes,
        "ranks_per_node": ranks_per_node,
        **_gpu_fields(node.gpu, catalog().gpus[node.gpu]),
        **_node_fields(node, ranks_per_node),
    }


def named_cluster(name: str) -> ClusterSpec:
    """The cluster that a name describes.

    A node with fewer or more GPUs than the catalog's has a proportional share of its host memory,
    cores, network adapters and drives.

    Raises:
        InputError: for another form, an unknown GPU or node, or more CPU ranks than cores.
    """
    cpu = re.fullmatch(r"cpu:(\d{1,6})", name.lower(), re.ASCII)
    if cpu:
        return local_cpu_cluster(int(cpu[1]))
    node = re.fullmatch(r"(?:(\d{1,6})x)?(\w[\w.-]*)", name, re.ASCII)
    gpus = re.fullmatch(r"(?:(\d{1,6})x)?(\d{1,6})x([A-Za-z0-9-]+)", name, re.ASCII)
    known_nodes = {key.lower() for key in catalog().nodes}
    if node and node[2].lower() in known_nodes:
        data = _node_cluster(int(node[1] or 1), node[2])
    elif gpus:
        data = _gpu_cluster(int(gpus[1] or 1), int(gpus[2]), gpus[3])
    else:
        hint = nearest_names(name, (*catalog().nodes, *catalog().gpus))
        raise InputError(f"cluster: {name[:60]!r} is not allowed: {_FORMS}{hint}")
    return validate(_CLUSTER, data, f"cluster {name!r}", _FIELDS)


def _described_cluster(data: object, what: str, name: str) -> ClusterSpec:
    """Build a cluster from a mapping: the base's fields, then its GPU's, then the mapping's own.

    Args:
        data: the content of a cluster file.
        what: opens an error line.
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
        InputError: for an unknown name, GPU or node, more CPU ranks than cores, or a bad file.
    """
    if isinstance(source, ClusterSpec):
        return source
    if isinstance(source, Mapping):
        return _described_cluster(source, "cluster", "custom")
    path = Path(source)
    if path.suffix in SPEC_SUFFIXES:
        return _described_cluster(read_mapping(path), str(path), path.stem)
    return named_cluster(str(source))


def unbounded_cluster(ranks: int, gpu: str = "H100") -> ClusterSpec:
    """One node of ``ranks`` GPUs with unlimited memory, to estimate memory before a cluster is chosen."""
    return ClusterSpec(name="any", gpu=gpu, ranks_per_node=ranks, device_memory_bytes=2**60)
