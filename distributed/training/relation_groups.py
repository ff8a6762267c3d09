"""Relation parallelism under DeepSpeed: the ranks as groups x replicas, gradients, and the norm over all owners.

A group of G consecutive ranks shares out the relations; the D ranks with the same place in their groups are replicas.
To DeepSpeed a group is a model-parallel group and the replicas are a data-parallel group, over which ZeRO of any stage
partitions and averages. Two things are left to do here, for every parameter as soon as its gradient is complete:

    tables    their gradient is the sum over the samples of the group: it is divided by G
    others    every rank of the group has the gradient of its own samples: it is averaged over the group

Sources: DeepSpeed 0.19.8, runtime/utils.py (is_model_parallel_parameter, get_weight_norm), runtime/zero/stage3.py
(_get_norm_groups) and runtime/fp16/unfused_optimizer.py (step).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from translution.models.layers import OwnedTables
from translution.models.relation_parallel import split_world


class RelationMesh:
    """All ranks as groups that share out the relations, and replicas; the ``mpu`` of DeepSpeed.

    Args:
        relation_ranks: ranks of a group, G.

    Raises:
        InputError: if the number does not divide the number of ranks.
    """

    def __init__(self, relation_ranks: int) -> None:
        self.group, self.replicas = split_world(relation_ranks)

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        """Ranks that share out the relations with this one."""
        return self.group

    def get_model_parallel_rank(self) -> int:
        """Place of this rank in its group."""
        return dist.get_rank(self.group)

    def get_model_parallel_world_size(self) -> int:
        """Ranks of a group, G."""
        return dist.get_world_size(self.group)

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        """Ranks that own the same relations as this one."""
        return self.replicas

    def get_data_parallel_rank(self) -> int:
        """Number of this rank's group."""
        return dist.get_rank(self.replicas)

    def get_data_parallel_world_size(self) -> int:
        """Number of groups, D."""
        return dist.get_world_size(self.replicas)

    def get_data_parallel_group_ranks(self) -> list[int]:
        """Numbers of the ranks that own the same relations as this one."""
        return dist.get_process_group_ranks(self.replicas)


def owned_parameters(network: nn.Module) -> set[int]:
    """Return the identities of the parameters that are tables of a rank's own relations."""
    tables = (module for module in network.modules() if isinstance(module, OwnedTables))
    return {id(parameter) for module in tables for parameter in module.parameters()}


def average_over_group(network: nn.Module, mesh: RelationMesh) -> None:
    """Let every gradient become its mean over the group before it is accumulated, and mark the tables for DeepSpeed.

    Every rank must differentiate the same network, so that the collectives have the same order.

    Args:
        network: the network of one rank, before DeepSpeed wraps it.
        mesh: the ranks.
    """
    ranks, owned = mesh.get_model_parallel_world_size(), owned_parameters(network)

    def average(gradient: Tensor) -> Tensor:
        # The gradient may share its memory with that of an activation.
        mean = gradient.contiguous() / ranks
        dist.all_reduce(mean, group=mesh.group)
        return mean

    def scale(gradient: Tensor) -> None:
        gradient.div_(ranks)

    for parameter in network.parameters():
        if id(parameter) in owned:
            # DeepSpeed counts such a parameter on all ranks of a group, the others on its first rank.
            parameter.model_parallel = True  # type: ignore[attr-defined]  # an attribute that only DeepSpeed knows
            parameter.register_hook(scale)
        else:
            parameter.register_hook(average)


def compare_replicas(mesh: RelationMesh) -> None:
    """Let ZeRO-3 compare its order of modules with that of the first replica, instead of with that of rank 0.

    Another owner may have one tile more.
    """
    utils: Any = importlib.import_module("deepspeed.runtime.zero.utils")
    source = mesh.get_data_parallel_group_ranks()[0]

    def list_of_first(own: list[int]) -> list[int]:
        found = [own]
        dist.broadcast_object_list(found, src=source, group=mesh.replicas)
        return found[0]

    utils.get_lst_from_rank0 = list_of_first
    # Lists of different lengths differ.
    utils.assert_lst_len_same_as_other_ranks = lambda own: None


def complete_norms(optimizer: Any, mesh: RelationMesh) -> None:
    """Let the norm of the gradients count the tables of all owners under every optimizer of DeepSpeed.

    ZeRO-1 and 2, and the optimizers of bf16 and of fp16 with fused Adam, do so by themselves.

    Args:
        optimizer: DeepSpeed's optimizer.
        mesh: the ranks.
    """
    from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer

    if hasattr(optimizer, "_get_norm_groups"):
        _join_norms(optimizer, mesh)
    elif isinstance(optimizer, FP16_UnfusedOptimizer):
        _mark_gradients(optimizer)


def _join_norms(optimizer: Any, mesh: RelationMesh) -> None:
    """Let ZeRO-3 add up the norms of a group once, instead of once per sub-group.

    An owner may have one relation more than others, and hence one sub-group more: DeepSpeed would wait for ever.
    """
    from deepspeed.accelerator import get_accelerator

    own_norms: Callable[[], list[Tensor]] = optimizer._get_norm_groups

    def joined() -> list[Tensor]:
        optimizer._model_parallel_all_reduce = lambda tensor, op: None
        try:
            norms = torch.stack([norm.float() for norm in own_norms()])
        finally:
            del optimizer._model_parallel_all_reduce
        # DeepSpeed marks a norm that is not finite by -1. With offload, norms are on the host, where NCCL has no sums.
        square = torch.where(norms < 0, torch.inf, norms.square()).sum().to(get_accelerator().current_device_name())
        dist.all_reduce(square, group=mesh.group)
        return [torch.where(square.isfinite(), square.sqrt(), -1.0).to(norms.device)]

    optimizer._get_norm_groups = joined


def _mark_gradients(optimizer: Any) -> None:
    """Mark the gradients of tables: without ZeRO, DeepSpeed asks them instead of their parameters."""
    step: Callable[..., Any] = optimizer.step

    def marked(*arguments: Any, **options: Any) -> Any:
        for parameter in (parameter for group in optimizer.fp16_groups for parameter in group):
            if parameter.grad is not None:
                parameter.grad.model_parallel = getattr(parameter, "model_parallel", False)
        return step(*arguments, **options)

    optimizer.step = marked
