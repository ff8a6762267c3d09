"""The network of a plan under torch's FSDP2: every tile, every block and the rest is a group that is gathered at once.

Source: torch 2.13, torch.distributed.fsdp.fully_shard.
"""

from __future__ import annotations

import os

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.modules.module import register_module_module_registration_hook

from translution.models import build
from translution.models.layers import Tile
from translution.models.networks import Block
from translution.planner.common import InputError
from translution.planner.plans import Plan

from ..training.engine import COLLECTIVE_LIMIT, MODEL_DTYPES


def join_ranks(plan: Plan) -> DeviceMesh:
    """Join the process group of torchrun's ranks, NCCL on GPUs and gloo on CPUs; return the mesh of all ranks.

    Raises:
        InputError: if the number of ranks differs from the plan's.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size != plan.world_size:
        raise InputError(f"WORLD_SIZE: {world_size} is not allowed: must be {plan.world_size}, as planned")
    device = plan.cluster.device
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    torch.distributed.init_process_group("nccl" if device == "cuda" else "gloo", timeout=COLLECTIVE_LIMIT)
    return init_device_mesh(device, (world_size,))


def _free(module: nn.Module, *_: object) -> None:
    assert isinstance(module, FSDPModule)
    module.reshard()


def build_sharded(plan: Plan, mesh: DeviceMesh) -> nn.Module:
    """Build a plan's network with the same initial weights as without FSDP2; a rank holds one full tile at a time.

    Parameters are fp32 and split along their first dimension; they are gathered, and gradients reduced, in the plan's
    precision.

    Args:
        plan: gives model, tiles, precision, seed and whether backward prefetches.
        mesh: the ranks, in one dimension.
    """
    dtype = MODEL_DTYPES[plan.training.precision]
    narrow = None if dtype == torch.float32 else dtype
    # Without `reduce_dtype`, torch 2.15 reduces in the parameters' fp32.
    policy = MixedPrecisionPolicy(param_dtype=narrow, reduce_dtype=narrow)

    def shard(module: nn.Module) -> None:
        fully_shard(module, mesh=mesh, mp_policy=policy)
        if isinstance(module, Tile):
            # In a recomputed block FSDP2 would keep all tiles gathered until their backward.
            module.register_forward_hook(_free)

    def shard_part(parent: nn.Module, name: str, module: nn.Module | None) -> None:
        if isinstance(module, Tile | Block) and not isinstance(module, FSDPModule):
            shard(module)

    torch.manual_seed(plan.training.seed)
    # A tile or block is sharded as soon as it becomes part of another module, before the next one is made.
    handle = register_module_module_registration_hook(shard_part)
    try:
        network = build(plan.model, tile_relations=plan.tile_relations)
    finally:
        handle.remove()
    shard(network)
    for module in network.modules():
        if isinstance(module, FSDPModule) and not plan.zero.prefetch_bucket_elements:
            # Without a list FSDP2 prefetches the next group; a group that prefetches itself gathers nothing.
            module.set_modules_to_backward_prefetch([module])
    for buffer in network.buffers():
        if buffer.is_floating_point():
            buffer.data = buffer.data.to(dtype)
    return network


def make_optimizer(plan: Plan, network: nn.Module) -> torch.optim.AdamW:
    """Return torch's AdamW of the plan over a rank's shares: fused, or a loop over tensors as on CPUs."""
    training = plan.training
    kernel = {"foreach": False} if training.adam == "loop" else {"fused": True}
    return torch.optim.AdamW(
        network.parameters(),
        lr=training.learning_rate,
        betas=training.betas,
        eps=training.epsilon,
        weight_decay=training.weight_decay,
        **kernel,
    )
