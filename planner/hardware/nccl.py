"""Memory of the communicators of NCCL and RCCL, which is outside of torch's allocator.

A *channel* has its own ring and tree; each of its connections has buffers on the receiving side. A connection is made
when an algorithm first needs it. Sources: NCCL's ``src/include/device.h`` (sizes), ``transport/p2p.cc`` (NVLink),
``transport/net.cc`` (network), ``transport/nvls.cc`` (reduction in the switch), and
github.com/NVIDIA/nccl/issues/986: memory grows with the channels, but not beyond two nodes. Measured by others for one
communicator: 688 MiB on 4 A100 (github.com/NVIDIA/nccl/issues/964), 958 MiB on 8 GPUs
(github.com/vllm-project/vllm/pull/46234) and 1.6 GB (github.com/NVIDIA/nccl/issues/864).
"""

from __future__ import annotations

from typing import NamedTuple

from ..common.phases import Tier
from ..common.units import MIB
from .catalog import ESTIMATE, OverheadItem

COMMUNICATORS = 2
"""Communicators of a DeepSpeed rank: torch's default group for barriers, its clone for the rest (groups.py:723)."""


def communicators_of(world_size: int, relation_ranks: int) -> int:
    """Return the communicators of a rank with peers, among them those of its relation group and of its replicas.

    An all-to-all connects every two ranks of the group; that is counted as one more communicator with rings. Nobody has
    measured it.

    Args:
        world_size: number of ranks.
        relation_ranks: ranks that share out the relations, G; 1 for none.
    """
    return COMMUNICATORS + 2 * (relation_ranks > 1) + (1 < relation_ranks < world_size)


_LL_BYTES = 8 * 512 * 8 * 16
CONNECTION_BYTES = 4 * MIB + _LL_BYTES + 120 * 640 * 8 * 8
"""Bytes of one connection: NCCL_BUFFSIZE, and the queues of LL and LL128 (lines x threads x steps x width)."""
_PAGE = 2 * MIB
_ARRIVING = -(-CONNECTION_BYTES // _PAGE) * _PAGE
_DIRECTION = _ARRIVING + _PAGE
"""Bytes per direction between two GPUs of a node: buffers of the receiver and one page of the sender."""
_RING_OUTWARD = _ARRIVING - _PAGE
"""Additional bytes if a ring leaves the node: the sender over the network has buffers too."""
_TREE_OUTWARD = 3 * 2 * _ARRIVING
"""Additional bytes if a tree leaves the node: a parent and two children in other nodes, both directions."""
_NETWORK_LINKS = 8
"""Network connections of a channel: both directions of a ring, of a tree's parent and of its two children."""
_NVLS_CHANNEL = 2 * 8 * 128 * 1024
"""Bytes of NVLS per channel and GPU of the node: 8 steps of NVLS_CHUNKSIZE, up and down."""


class Base(NamedTuple):
    """Bytes that the first communicator and each further one hold without connections: kernels and queues."""

    first: tuple[int, int, int]
    """Low, likely and high."""
    further: tuple[int, int, int]
    source: str

    def of(self, communicators: int, level: int) -> int:
        """Return the bytes of several communicators; ``level`` is 0, 1 or 2."""
        return self.first[level] + (communicators - 1) * self.further[level]


GUESSED_BASE = Base(
    (0, 64 * MIB, 224 * MIB),
    (0, 64 * MIB, 224 * MIB),
    f"kernels and queues of a communicator: {ESTIMATE}, high by github.com/NVIDIA/nccl/pull/2366",
)
"""For GPUs on which nobody measured it."""
_LONE_CHANNELS = 8
"""Maximum channels of a node with one GPU. Estimate, not measured."""


class Channels(NamedTuple):
    """Number of channels that NCCL uses for collectives, and the source."""

    low: int
    likely: int
    high: int
    source: str


def _pair(
    sizes: tuple[int, int, int], hosts: tuple[int, int, int], formula: str, source: str, host_source: str
) -> list[OverheadItem]:
    """Return the item of the device and the item of the host."""
    return [
        OverheadItem(
            name="nccl",
            low_bytes=sizes[0],
            likely_bytes=sizes[1],
            high_bytes=sizes[2],
            formula=formula,
            source=source,
        ),
        OverheadItem(
            name="nccl_host",
            tier=Tier.HOST,
            low_bytes=hosts[0],
            likely_bytes=hosts[1],
            high_bytes=hosts[2],
            formula="pinned and shared buffers of a rank",
            source=host_source,
        ),
    ]


def alone(base: Base) -> list[OverheadItem]:
    """Return the items of a rank without peers, which makes no connection.

    Args:
        base: bytes without connections.
    """
    return _pair(base.first, (0, 0, 0), "communicators without peers", base.source, "no connection")


def rccl(communicators: int = COMMUNICATORS) -> list[OverheadItem]:
    """Return the items of an AMD rank with peers.

    Args:
        communicators: number of communicators.
    """
    further = "the second" if communicators == COMMUNICATORS else f"each of {communicators - 1} others"
    return _pair(
        (666 * MIB, (1024 + 666 * (communicators - 1)) * MIB, communicators * 64 * 2 * _DIRECTION),
        (0, 8 * MIB, 512 * MIB),
        f"1 GiB for the first communicator, 0.65 GiB for {further}; low: one communicator; high: 64 channels each",
        "MI250X, not MI300X: github.com/Lumi-supercomputer/LUMI-AI-Guide/issues/111; "
        f"low and high: {ESTIMATE}; 64 channels of MI350X: github.com/ROCm/rocm-systems/pull/9764",
        ESTIMATE,
    )


def _outward(channels: Channels, per_node: int, nodes: int) -> list[int]:
    """Return the number of channels that leave the node at this rank, by level; fewer if the node has one GPU."""
    counts = [min(count, _LONE_CHANNELS) if per_node == 1 else count for count in channels[:3]]
    return [-(-count // per_node) if nodes > 1 else 0 for count in counts]


def by_nvlink(
    channels: Channels,
    per_node: int,
    nodes: int,
    base: Base,
    *,
    switches_reduce: bool,
    communicators: int = COMMUNICATORS,
) -> list[OverheadItem]:
    """Return the items of a rank whose node has NVLink.

    Low: one communicator with rings. Likely: one with rings, trees and NVLS, and the others with rings. High: all with
    rings, trees and NVLS.

    Args:
        channels: NCCL's channels.
        per_node: ranks per node.
        nodes: number of nodes; more than one adds connections over the network.
        base: bytes of communicators without connections.
        switches_reduce: whether the node has NVSwitches that reduce (NVLS), as from Hopper on.
        communicators: number of communicators.
    """
    outward = _outward(channels, per_node, nodes)
    within = [count * _DIRECTION if per_node > 1 else 0 for count in (channels.low, channels.likely, channels.high)]
    ring_outward = _RING_OUTWARD if per_node > 1 else 2 * _ARRIVING
    rings = [inner + out * ring_outward for inner, out in zip(within, outward, strict=True)]
    trees = [inner + out * _TREE_OUTWARD for inner, out in zip(within, outward, strict=True)]
    heads = min(per_node, 8) if switches_reduce and per_node > 1 else 0
    nvls = [count * _NVLS_CHANNEL * heads for count in (0, 16, 24)]
    sizes = (
        rings[0],
        communicators * rings[1] + trees[1] + nvls[1] + base.of(communicators, 1),
        communicators * (rings[2] + trees[2] + nvls[2]) + base.of(communicators, 2),
    )
    links = [out * _NETWORK_LINKS for out in outward]
    hosts = (
        links[0] * _LL_BYTES,
        communicators * links[1] * _LL_BYTES + 8 * MIB,
        communicators * links[2] * CONNECTION_BYTES + 64 * MIB,
    )
    formula = (
        f"{channels.likely} channels x {_DIRECTION // MIB} MiB x (rings of {communicators} communicators, trees of one)"
    )
    if heads:
        formula += f", {nvls[1] // MIB} MiB of NVLS"
    if nodes > 1:
        formula += ", connections to other nodes"
    return _pair(
        sizes,
        hosts,
        f"{formula}; low: rings of one communicator; high: everything for {'both' if communicators == 2 else 'all'}",
        f"{channels.source}; sizes computed from NCCL's source; {base.source}",
        f"LL queues of network connections, high: all queues: NCCL, net.cc; the rest: {ESTIMATE}",
    )


def by_host_memory(
    channels: Channels, per_node: int, nodes: int, base: Base, *, communicators: int = COMMUNICATORS
) -> list[OverheadItem]:
    """Return the items of a rank whose node has only PCIe: buffers in host memory; with peer access, on the GPU.

    Args:
        channels: NCCL's channels.
        per_node: ranks per node.
        nodes: number of nodes.
        base: bytes of communicators without connections.
        communicators: number of communicators.
    """
    outward = _outward(channels, per_node, nodes)
    sizes = (
        0,
        base.of(communicators, 1) + outward[1] * (communicators * _RING_OUTWARD + _TREE_OUTWARD),
        communicators * (2 * channels.high * _DIRECTION + outward[2] * (_RING_OUTWARD + _TREE_OUTWARD))
        + base.of(communicators, 2),
    )
    hosts = (
        channels.low * CONNECTION_BYTES,
        (communicators + 1) * channels.likely * CONNECTION_BYTES,
        communicators * (2 * channels.high + _NETWORK_LINKS * outward[2]) * CONNECTION_BYTES,
    )
    return _pair(
        sizes,
        hosts,
        "buffers in host memory; high: on the GPU, rings and trees of "
        f"{'two' if communicators == COMMUNICATORS else communicators} communicators",
        f"{channels.source}; sizes computed from NCCL's source; {base.source}",
        "9.19 MiB a connection: github.com/tonyd2wild/DeepSeek-V4.1-Flash-vLLM-DGX-Spark/issues/8",
    )
