"""Upper bound of what FSDP2 holds of parameters, gradients and states: never below the simulated peaks.

Every term matches one of `simulator/engine/fsdp2.py`; terms that peak at different times there are added here.
"""

from __future__ import annotations

from ..common.units import FP32_BYTES
from ..config.run_config import RunConfig
from ..costs.optimizer import temporary_tensors
from ..simulator.core import RankMemory
from ..simulator.engine.base import EngineConfig
from ..simulator.engine.fsdp2 import Fsdp2Engine, ShardedGroup
from ..simulator.network.model import SimulatedNetwork
from ..simulator.network.ops import DtypeSizes
from .bounds import WeightsBound


def _largest(groups: list[ShardedGroup]) -> int:
    return max((group.padded for group in groups), default=0)


def bound_fsdp2(run: RunConfig) -> WeightsBound:
    """Return the part of the upper bound that neither the micro-batch nor checkpointing changes.

    Args:
        run: what is trained, where and how.
    """
    config, device = EngineConfig(run), run.cluster.device
    network = SimulatedNetwork(run.model, 1, DtypeSizes.of_training(run.training, device), run.tile_relations)
    engine = Fsdp2Engine(RankMemory(device), config, network)
    width, share = config.width, sum(group.share for group in engine.groups)
    block, root = _largest(engine.blocks), engine.root.padded
    largest = max(_largest(engine.tiles), block, root)
    bounds = WeightsBound(run.on_cpu, device=2 * share * FP32_BYTES + config.state_bytes(share))
    # A group's buffer, gloo's copy and the tensors; the input of the reduction before and its copy; a block and the
    # rest stay gathered, all three have gradients.
    copies = 5 if run.on_cpu else 3
    prefetched = largest if run.zero.prefetch_bucket_elements else 0
    bounds.running = ((copies + 1) * largest + 2 * (block + root) + prefetched) * width
    bounds.running += 2 * max(group.share for group in engine.groups) * FP32_BYTES
    temporary = temporary_tensors(run.training, on_cpu=run.on_cpu, offloaded=False, one_by_one=True)
    bounds.elsewhere = max(temporary * max(group.largest for group in engine.groups) * FP32_BYTES, largest * FP32_BYTES)
    # The operators of all blocks are made before the first block is sharded, except for their tiles.
    whole = sum(group.padded for group in (*engine.blocks, engine.root)) + largest
    if run.on_cpu:
        bounds.least = (share + whole) * FP32_BYTES
    else:
        bounds.device += 2 * largest * width
        bounds.add_transient(whole * FP32_BYTES)
        bounds.add_transient(share * FP32_BYTES + config.state_bytes(share))
    return bounds
