"""State dicts with the tables of all ranks, as a network of one process has them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from translution.planner.common import InputError

from ..layers import OwnedTables


def gather_state_dict(model: nn.Module, to: int = 0) -> dict[str, Tensor]:
    """Collect the state dict of the network that one process would have, on the CPU of one rank.

    Tables are gathered one after the other, so that no more than one is whole on a device. All ranks must call this.

    Args:
        model: network whose layers have a relation group; inside DistributedDataParallel its ``module``.
        to: rank within the group that returns it.

    Returns:
        The state dict, which a network without groups and with tiles of the same size loads; empty on other ranks.
    """
    found = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    rank = 0
    for prefix, tables in _owned(model):
        rank = tables.group.rank
        for name, _ in tables.named_parameters():
            del found[prefix + name]
        for role, whole in tables.gather_tables():
            if rank != to:
                continue
            on_host = whole.cpu()
            for tile, roles, relations in tables.whole_tiles():
                if role in roles:
                    found[f"{prefix}{tile}.{role}"] = on_host[relations.start : relations.stop].clone()
    return found if rank == to else {}


def load_whole_state_dict(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load a state dict with whole tables: each rank takes the matrices of its relations.

    Args:
        model: network whose layers have a relation group; inside DistributedDataParallel its ``module``.
        state: state dict of `gather_state_dict`, or of a network without groups, with tiles of any size.

    Raises:
        InputError: if a table is missing or has another shape.
    """
    own = dict(state)
    for prefix, tables in _owned(model):
        whole = {role: _whole_table(own, prefix, role, tables) for role in sorted(tables.relative)}
        own |= {prefix + name: part for name, part in tables.select_tables(whole).items()}
    model.load_state_dict(own)


def _owned(model: nn.Module) -> list[tuple[str, OwnedTables]]:
    """Return the tables of the layers, with what precedes the names of their Parameters."""
    return [(f"{name}." if name else "", x) for name, x in model.named_modules() if isinstance(x, OwnedTables)]


def _whole_table(state: dict[str, Tensor], prefix: str, role: str, tables: OwnedTables) -> Tensor:
    """Take the tiles of one table out of a state dict; return it, (R, d_in, d_out)."""
    kind = "value_tiles" if role == "value" else "logit_tiles"
    parts: list[Tensor] = []
    while (name := f"{prefix}{kind}.{len(parts)}.{role}") in state:
        parts.append(state.pop(name))
    shape = (tables.whole.relations, *tables.widths)
    found = tuple(torch.cat(parts).shape) if parts else None
    if found != shape:
        raise InputError(f"{prefix}{kind}: a {role} table of shape {found} is not allowed: must be {shape}")
    return torch.cat(parts)
