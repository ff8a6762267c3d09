"""Load relation tables of the published code, or of another layer, into a layer of any tiling."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from translution.planner.common import InputError

from ..layers.tables import ROLE_NAMES
from ..layers.translution import AlphaTranslution, Translution


@torch.no_grad()
def load_tables(
    layer: Translution | AlphaTranslution, tables: Mapping[str, Tensor], *, published_names: bool = False
) -> None:
    """Load full tables into a layer of any tiling; the layer's other weights stay unchanged.

    Args:
        layer: layer whose tables are overwritten.
        tables: role ("q", "k", "v") → (R, C, C'), for exactly the layer's relative roles; relations are
            numbered as in `RelationGeometry`.
        published_names: True for tables of the published code, which swaps the names query and key of
            the paper's equations.

    Raises:
        InputError: naming the role that is missing, unexpected or of the wrong shape.
    """
    wanted = set(layer.roles)
    if published_names:
        names = {"q": "k", "k": "q", "v": "v"}
        tables = {names.get(role, role): table for role, table in tables.items()}
    if set(tables) != wanted:
        raise InputError(f"tables: roles {sorted(tables)} are not allowed: must be {sorted(wanted)}")
    shape = (layer.geometry.relations, *layer.tables.widths)
    for role, table in tables.items():
        if tuple(table.shape) != shape:
            raise InputError(f"tables: {role} of shape {tuple(table.shape)} is not allowed: must be {shape}")
    for role, table in tables.items():
        layer.tables.load_table(ROLE_NAMES[role], table)


def tables_from_state_dict(state: Mapping[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
    """Select one layer's tables from a state dict that has one (R, C, C') tensor per role.

    Args:
        state: state dict of a network.
        names: role → key of its table in the state dict, such as ``{"q": "layers.0.to_q.unique_params"}``.

    Returns:
        Role → table, (R, C, C') each, as `load_tables` takes them.

    Raises:
        InputError: naming a key that is missing.
    """
    for key in names.values():
        if key not in state:
            raise InputError(f"state dict: has no {key!r}")
    return {role: state[key] for role, key in names.items()}
