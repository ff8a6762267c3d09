"""Simulation of torch's FSDP2: every tile, every block and the rest of the network is a group of parameters.

A group's parameters are split along their first dimension and gathered into one buffer, from which they are copied out.
Source: torch 2.13, distributed/fsdp/_fully_shard (`FSDPParamGroup`, `foreach_all_gather`, `foreach_reduce`).
"""

from __future__ import annotations

from collections.abc import Sequence

from ...common.units import FP32_BYTES
from ..core import ModuleParams, RankMemory, Storage
from ..network.block import SimulatedBlock
from ..network.model import SimulatedNetwork
from .base import (
    BACKEND_COPIES,
    BUFFERS,
    CONSTRUCTION_TENSORS,
    GATHER_COPIES,
    GATHERED,
    PARAMETERS,
    REDUCE_COPIES,
    SHARED_GRADIENTS,
    STAGING,
    STREAMS,
    EngineConfig,
    SimulatedEngine,
)
from .coordinator import ceil_div


def share_numels(weights: ModuleParams, world_size: int) -> list[int]:
    """Return the elements of a rank's share of each tensor, padded to equal shares of the first dimension."""
    lengths = weights.lengths or weights.numels
    return [
        ceil_div(length, world_size) * (numel // length) for numel, length in zip(weights.numels, lengths, strict=True)
    ]


class ShardedGroup:
    """Parameters that are gathered together, and their gradients, which are reduced together.

    Args:
        modules: the parameters, module by module.
        world_size: number of ranks.
    """

    def __init__(self, modules: Sequence[ModuleParams], world_size: int) -> None:
        self.modules = modules
        self.share = sum(numel for weights in modules for numel in share_numels(weights, world_size))
        """Elements of a rank's share."""
        self.padded = self.share * world_size
        """Elements of all shares together."""
        self.largest = max((max(share_numels(weights, world_size)) for weights in modules), default=0)
        """Elements of a rank's share of the largest tensor."""
        self.full: Storage | None = None
        self.ahead: Storage | None = None
        """Buffer of a gather that is prefetched."""
        self.waiting: list[Storage] = []
        """Full gradients that are not yet reduced."""
        self.missing = len(modules)
        """Modules that have not yet run in this pass."""
        self.gradient: Storage | None = None


def _tiles(block: SimulatedBlock) -> list[ModuleParams]:
    return [tile.weights for tile in (*block.logit_tiles, *block.value_tiles)]


class Fsdp2Engine(SimulatedEngine):
    """FSDP2: what a rank holds, and the copies that its collectives make.

    Args:
        memory, config, network: as in `SimulatedEngine`.
    """

    def __init__(self, memory: RankMemory, config: EngineConfig, network: SimulatedNetwork) -> None:
        super().__init__(memory, config, network)
        self.width, self.world_size = config.width, config.replicas
        self.tiles = [ShardedGroup([weights], self.world_size) for block in network.blocks for weights in _tiles(block)]
        tiled = {id(group.modules[0]) for group in self.tiles}
        blocks = [[weights for weights in block.modules if id(weights) not in tiled] for block in network.blocks]
        self.blocks = [ShardedGroup(modules, self.world_size) for modules in blocks]
        inside = {id(weights) for block in network.blocks for weights in block.modules}
        rest = [weights for weights in network.modules if id(weights) not in inside]
        self.root = ShardedGroup(rest, self.world_size)
        self.groups = [*self.tiles, *self.blocks, self.root]
        self.group_of = {id(weights): group for group in self.groups for weights in group.modules}
        self.order: list[ShardedGroup] = []
        """The groups in the order of their gathers in forward."""
        self.in_backward = False
        self.last_gather: Storage | None = None
        """Buffer of the newest gather in forward, which the next one frees."""
        self.last_reduce: Storage | None = None
        """Input of the newest reduction, which the next one frees."""
        self.last_copy: Storage | None = None
        """gloo's copy of the newest collective's input or output, which its thread frees before the next one."""

    # Building.
    def build(self) -> None:
        """Build the operators, then the blocks; a tile and a block are sharded as soon as they are made."""
        self.memory.at("construction")
        self.keep(self.memory.device, BUFFERS, self.network.buffer_bytes)
        held: dict[int, list[Storage]] = {}
        tiles = {id(group.modules[0]): group for group in self.tiles}
        for block in self.network.blocks:
            for weights in block.construction:
                held[id(weights)] = self._make(weights)
                if id(weights) in tiles:
                    self._shard(tiles[id(weights)], held)
        for group in (*self.blocks, self.root):
            for weights in group.modules:
                if id(weights) not in held:
                    held[id(weights)] = self._make(weights)
            self._shard(group, held)
        if not self.memory.on_cpu:
            # Of two groups the buffers wait for another stream.
            largest = max(group.padded for group in self.groups) * self.width
            self.keep(self.memory.device, STREAMS, 2 * largest)

    def _make(self, weights: ModuleParams) -> list[Storage]:
        return [Storage(self.memory.host, CONSTRUCTION_TENSORS, numel * FP32_BYTES) for numel in weights.numels]

    def _shard(self, group: ShardedGroup, held: dict[int, list[Storage]]) -> None:
        """Keep a rank's share of a group; on a GPU the full tensors are copied to the device first."""
        copies = [] if self.memory.on_cpu else [group.padded * FP32_BYTES]
        moved = [Storage(self.memory.device, STAGING, size) for size in copies]
        self.keep(self.memory.device, PARAMETERS, group.share * FP32_BYTES)
        for weights in group.modules:
            held[id(weights)].clear()
        moved.clear()

    # A micro-batch.
    def fetch(self, weights: ModuleParams, *, backward: bool) -> None:
        """Gather the group of a module, unless it is gathered."""
        group = self.group_of[id(weights)]
        if backward and not self.in_backward:
            self.in_backward, self.last_gather = True, None
        if group.full is not None:
            return
        if group.ahead is None:
            group.ahead = self._gather(group)
        buffer, group.ahead = group.ahead, None
        # A block is gathered for backward before it is recomputed.
        in_forward = not backward and not (self.in_backward and group in self.blocks)
        if in_forward:
            self.last_gather = None
            self.order += [] if self.in_backward else [group]
        group.full = Storage(self.memory.device, GATHERED, group.padded * self.width)
        if in_forward:
            self.last_gather = buffer
        del buffer
        group.missing = len(group.modules)
        if backward and self.config.zero.prefetch_bucket_elements:
            self._prefetch(group)

    def _gather(self, group: ShardedGroup) -> Storage:
        """Return the buffer of a gather."""
        memory, size = self.memory, group.padded * self.width
        narrow = self.last_copy = None
        if self.width != FP32_BYTES:
            narrow = Storage(memory.device, GATHER_COPIES, group.share * self.width)
        buffer = Storage(memory.device, GATHER_COPIES, size)
        self._copy(size)
        del narrow
        return buffer

    def _copy(self, size_bytes: int) -> None:
        """Hold the copy with which gloo works until the next collective: its thread frees it at some time before."""
        if self.memory.uses_gloo:
            self.last_copy = Storage(self.memory.device, BACKEND_COPIES, size_bytes)

    def _prefetch(self, group: ShardedGroup) -> None:
        """Start the gather of the group that ran before this one in forward."""
        place = next((number for number, each in enumerate(self.order) if each is group), 0)
        before = self.order[place - 1] if place else None
        if before is not None and before.full is None and before.ahead is None:
            before.ahead = self._gather(before)

    def release(self, weights: ModuleParams, *, backward: bool) -> None:
        """Free a tile after forward, and a block when its last module has run; backward frees both with gradients."""
        group = self.group_of[id(weights)]
        if backward or group is self.root:
            return
        if self.in_backward:
            # A module that is recomputed is the outermost of its own forward pass, whose end frees the last buffer.
            self.last_gather = None
        group.missing -= 1
        is_tile = len(group.modules) == 1 and group not in self.blocks
        if not group.missing and (is_tile or not self.in_backward):
            group.full = None

    def gradients(self, weights: ModuleParams, grads: list[Storage]) -> None:
        """Collect a group's gradients; when all are there, free its parameters and reduce them."""
        group = self.group_of[id(weights)]
        group.waiting += grads
        grads.clear()
        if group is not self.root and len(group.waiting) == sum(len(each.numels) for each in group.modules):
            self._reduce(group)

    def _reduce(self, group: ShardedGroup) -> None:
        memory, size = self.memory, group.padded * self.width
        group.full = None
        self.last_reduce = self.last_copy = None
        self.last_reduce = Storage(memory.device, REDUCE_COPIES, size)
        group.waiting.clear()
        reduced: Storage | None = Storage(memory.device, SHARED_GRADIENTS, group.share * self.width)
        self._copy(size)
        if self.width != FP32_BYTES:
            reduced = Storage(memory.device, SHARED_GRADIENTS, group.share * FP32_BYTES)
        if group.gradient is None:
            group.gradient = reduced
        del reduced

    def finish(self) -> None:
        """Reduce the gradients of the rest of the network, and free what the last collectives used."""
        self._reduce(self.root)
        self.last_reduce = self.last_copy = self.last_gather = None
        self.in_backward = False
        self.order.clear()
        for group in self.groups:
            group.full = group.ahead = None
        super().finish()

    # The optimizer step, and checkpoints.
    def step(self, *, first: bool = False) -> None:
        """Update one tensor after the other, then free the gradients."""
        self.memory.at("optimizer step")
        self.passes = 0
        self.update(max(group.largest for group in self.groups), offloaded=False, one_by_one=True)
        for group in self.groups:
            group.gradient = None

    def save(self) -> None:
        """Write every rank's shares; a GPU's are copied to the host, all of them."""
        self.memory.at("checkpoint save")
        if not self.memory.on_cpu:
            share = sum(group.share for group in self.groups)
            self.memory.add_transient((self.memory.host, STAGING, share * FP32_BYTES + self.config.state_bytes(share)))

    def load(self) -> None:
        """Allocate the optimizer states and read the checkpoint into them and the parameters."""
        self.memory.at("resume")
        for group in self.groups:
            self.keep_states(self.memory.device, group.share)
