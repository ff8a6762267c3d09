"""Where a plan runs: nodes, ranks per node and the memory of each.

A cluster is named ``cpu:RANKS`` (this machine), ``8xH100`` (one node of eight) or ``2x8xH100``
(two nodes of eight), or described in a YAML or JSON file.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Literal

from pydantic import TypeAdapter

from .errors import InputError, nearest
from .files import SPEC_SUFFIXES, read_mapping
from .model_spec import Positive
from .schema import Schema, validate
from .units import GIB, MIB

GPU_MEMORY_BYTES: dict[str, int] = {
    "A100-40": 40_536 * MIB,
    "A100-80": 81_920 * MIB,
    "H100": 81_559 * MIB,
    "H200": 143_771 * MIB,
}
"""Total memory as nvidia-smi reports it for the SXM parts."""

_DEFAULT_HOST_BYTES = 1024 * GIB


class ClusterSpec(Schema):
    """A set of equal nodes."""

    name: str = "custom"
    device: Literal["cpu", "cuda"] = "cuda"
    """What a rank computes on; a CPU rank's device memory is its share of the node's memory."""
    nodes: Positive = 1
    ranks_per_node: Positive
    """One rank per GPU, or per CPU process."""
    device_memory_bytes: Positive
    """Memory of one rank's device."""
    host_memory_bytes: Positive = _DEFAULT_HOST_BYTES
    """Memory of one node beside the devices."""

    @property
    def ranks(self) -> int:
        """Ranks in all, the ZeRO partition world size."""
        return self.nodes * self.ranks_per_node


_CLUSTER: TypeAdapter[ClusterSpec] = TypeAdapter(ClusterSpec)


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def total_memory_bytes() -> int:
    """Physical memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


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
    )


def load_cluster(name_or_path: str) -> ClusterSpec:
    """The cluster that a name or a YAML or JSON file describes.

    Raises:
        InputError: for an unknown name or GPU, more CPU ranks than cores, or a bad file.
    """
    path = Path(name_or_path)
    if path.suffix in SPEC_SUFFIXES:
        data = read_mapping(path)
        return validate(_CLUSTER, data, str(path), tuple(ClusterSpec.model_fields))
    cpu = re.fullmatch(r"cpu:(\d{1,6})", name_or_path.lower())
    if cpu:
        return local_cpu_cluster(int(cpu[1]))
    gpus = re.fullmatch(r"(?:(\d{1,6})x)?(\d{1,6})x([A-Za-z0-9-]+)", name_or_path)
    if not gpus:
        raise InputError(
            f"cluster: {name_or_path!r} is not allowed: must be cpu:RANKS, GPUSxNAME, NODESxGPUSxNAME or a YAML file"
        )
    nodes, per_node, gpu = int(gpus[1] or 1), int(gpus[2]), gpus[3].upper()
    if gpu not in GPU_MEMORY_BYTES:
        known = ", ".join(GPU_MEMORY_BYTES)
        raise InputError(
            f"cluster: GPU {gpus[3]!r} is not allowed: must be one of {known}{nearest(gpu, GPU_MEMORY_BYTES)}"
        )
    data = {
        "name": f"{nodes}x{per_node}x{gpu}",
        "nodes": nodes,
        "ranks_per_node": per_node,
        "device_memory_bytes": GPU_MEMORY_BYTES[gpu],
    }
    return validate(_CLUSTER, data, f"cluster {name_or_path!r}", tuple(ClusterSpec.model_fields))
