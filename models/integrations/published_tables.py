"""Load relation tables of the published code, or of another layer, into a layer of any tiling."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from translution.planner.common import InputError

from ..layers.tables import ROLE_NAMES
from ..layers.translution import AlphaTranslution, Translution
from .published.revisions import Convention, find_convention


@torch.no_grad()
def load_tables(
    layer: Translution | AlphaTranslution, tables: Mapping[str, Tensor], *, revision: str | None = None
) -> None:
    """Load full tables into a layer of any tiling; the layer's other weights stay unchanged.

    Args:
        layer: layer whose tables are overwritten.
        tables: role ("q", "k", "v") → (R, C, C'), for exactly the layer's relative roles; relations are
            numbered as in `RelationGeometry`.
        revision: for tables of the published code, by the roles of its names: the commit that trained them, or "old" or
            "new". Its names have changed their roles, and a GPT's query table is stored in reverse. None for tables of
            the equations.

    Raises:
        InputError: naming the role that is missing, unexpected or of the wrong shape, or an unknown revision.
    """
    wanted = set(layer.roles)
    convention = None if revision is None else _convention(layer, revision)
    if convention is not None and convention is not Convention.NEW:
        names = {"q": "k", "k": "q", "v": "v"}
        tables = {names.get(role, role): table for role, table in tables.items()}
    if set(tables) != wanted:
        raise InputError(f"tables: roles {sorted(tables)} are not allowed: must be {sorted(wanted)}")
    shape = (layer.geometry.relations, *layer.tables.widths)
    for role, table in tables.items():
        if tuple(table.shape) != shape:
            raise InputError(f"tables: {role} of shape {tuple(table.shape)} is not allowed: must be {shape}")
    for role, table in tables.items():
        if role == "q" and convention is Convention.OLDEST:
            table = table[:1].expand(shape)
        elif role == "q" and convention is not None and layer.geometry.causal:
            table = table.flip(0)
        layer.tables.load_table(ROLE_NAMES[role], table)


def _convention(layer: Translution | AlphaTranslution, revision: str) -> Convention:
    geometry = layer.geometry
    if (geometry.causal, len(geometry.axes)) not in ((True, 1), (False, 2)):
        raise InputError(
            f"revision: {revision!r} is not allowed: the published code has causal sequences and images only"
        )
    family = "gpt" if geometry.causal else "vit"
    low_rank = isinstance(layer, AlphaTranslution)
    return find_convention(family, low_rank=low_rank, arch=None, revision=revision)


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
