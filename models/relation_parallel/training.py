"""What a training loop needs besides the layers: process groups, and the gradients of tables.

Backward of a layer gives each table the gradient of the summed losses of its group, since its rank has computed the
pairs of all samples there. Nothing is to be reduced within the group. A loop with DistributedDataParallel averages the
other gradients over all ranks; `average_table_gradients` gives the tables the same scale.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from translution.planner.common import InputError

from ..layers import OwnedTables
from ..ops.relation_parallel import all_gather_equal


def split_world(relation_ranks: int) -> tuple[dist.ProcessGroup, dist.ProcessGroup]:
    """Split all ranks into groups that share out the relations, and groups that own the same relations.

    Consecutive ranks, such as those of a node, share out the relations. All ranks must call this.

    Args:
        relation_ranks: number of ranks that share out the relations, G.

    Returns:
        The process group of this rank for ``relation_group``, and that of its replicas, the ranks that own the same
        relations.

    Raises:
        InputError: if the number does not divide the number of ranks.
    """
    world = dist.get_world_size()
    if relation_ranks < 1 or world % relation_ranks:
        raise InputError(f"relation_ranks: {relation_ranks} is not allowed: must divide the number of ranks {world}")
    groups = [list(range(first, first + relation_ranks)) for first in range(0, world, relation_ranks)]
    replicas = [list(range(place, world, relation_ranks)) for place in range(relation_ranks)]
    found = []
    for listed in (groups, replicas):
        own, _ = dist.new_subgroups_by_enumeration(listed)
        assert own is not None
        found.append(own)
    return found[0], found[1]


def _owned_tables(model: nn.Module) -> list[OwnedTables]:
    return [module for module in model.modules() if isinstance(module, OwnedTables)]


def exclude_tables(model: nn.Module) -> nn.Module:
    """Tell DistributedDataParallel to leave the tables that ranks own alone; return the model.

    Args:
        model: network whose layers have a relation group, before it is wrapped.
    """
    owned = {id(parameter) for tables in _owned_tables(model) for parameter in tables.parameters()}
    names = [name for name, parameter in model.named_parameters() if id(parameter) in owned]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)
    return model


def share_dropout(model: nn.Module, ranks: dist.ProcessGroup | None = None) -> nn.Module:
    """Let ranks drop the attention weights that one process with all their samples would; return the model.

    Without this, each relation group does so on its own. All ranks must call this, and have as many samples.

    Args:
        model: network whose layers have a relation group.
        ranks: all ranks of some relation groups; None for all ranks.
    """
    for tables in _owned_tables(model):
        found = dist.group.WORLD if ranks is None else ranks
        assert found is not None
        tables.group.dropout_ranks = found
    return model


@torch.no_grad()
def average_table_gradients(model: nn.Module, replicas: dist.ProcessGroup | None = None) -> None:
    """Turn the tables' gradients from sums over the samples of a group into averages over all ranks, in place.

    To be called after the backward passes of a step, and before clipping and the optimizer.

    Args:
        model: network whose layers have a relation group.
        replicas: ranks that own the same relations; None if there is one group.
    """
    copies = 1 if replicas is None else dist.get_world_size(replicas)
    for tables in _owned_tables(model):
        for parameter in tables.parameters():
            if parameter.grad is None:
                continue
            if copies > 1:
                dist.all_reduce(parameter.grad, group=replicas)
            parameter.grad /= copies * tables.group.size


@torch.no_grad()
def clip_gradients(model: nn.Module, max_norm: float) -> Tensor:
    """Scale all gradients so that their norm, over the tables of all owners, is at most ``max_norm``.

    Args:
        model: network whose layers have a relation group, the same in all layers.
        max_norm: the largest norm allowed.

    Returns:
        The norm before, a scalar, the same on all ranks of the group.
    """
    owned = _owned_tables(model)
    mine = {id(parameter): parameter for tables in owned for parameter in tables.parameters()}
    total = _squares(mine.values())
    if owned:
        squares = total.new_empty(owned[0].group.size)
        all_gather_equal(squares, total.view(1), owned[0].group.process_group)
        total = squares.sum()
    norm = (total + _squares(x for x in model.parameters() if id(x) not in mine)).sqrt()
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad *= factor.to(parameter.grad.dtype)
    return norm


def _squares(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Return the sum of the squared gradients."""
    given = list(parameters)
    device = given[0].device if given else None
    total = torch.zeros(
        (), dtype=torch.float64 if device is None or device.type == "cpu" else torch.float32, device=device
    )
    for parameter in given:
        if parameter.grad is not None:
            total += parameter.grad.square().sum(dtype=total.dtype)
    return total
