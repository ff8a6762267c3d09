"""Load tables of the published code into a layer."""

from __future__ import annotations

import pytest
import torch

from translution.models import Translution, load_tables, tables_from_state_dict
from translution.models.ops.naive import naive_relation_index
from translution.planner.common.errors import InputError

pytestmark = pytest.mark.usefixtures("double")


def test_published_tables_give_the_published_output() -> None:
    """Compare with the published layer's formula on its own state dict.

    There the weight named q multiplies the token that is attended to, and k the token that attends.
    """
    torch.manual_seed(0)
    heads, dim = 2, 6
    layer = Translution(dim, heads, grid=(2, 3), class_token=True, tile_relations=5)
    relations = layer.geometry.relations
    state = {f"to_{role}.unique_params": torch.randn(relations, dim, dim) for role in "qkv"}
    x = torch.randn(3, 7, dim)

    index = naive_relation_index(layer.geometry)
    rows = {
        role: torch.einsum("bmc,nmce->bnme", x, state[f"to_{role}.unique_params"][index]).unflatten(3, (heads, -1))
        for role in "qkv"
    }
    logits = torch.einsum("bnmhd,bmnhd->bhnm", rows["q"], rows["k"]) * (dim // heads) ** -0.5
    published = torch.einsum("bhnm,bnmhd->bnhd", logits.softmax(-1), rows["v"]).flatten(2)

    names = {role: f"to_{role}.unique_params" for role in "qkv"}
    load_tables(layer, tables_from_state_dict(state, names), published_names=True)
    torch.testing.assert_close(layer(x), layer.output(published), rtol=0, atol=1e-12)


def test_an_error_names_the_wrong_tables() -> None:
    layer = Translution(4, 2, length=3, roles="kv")
    table = torch.zeros(5, 4, 4)
    with pytest.raises(InputError, match=r"roles \['k'\] are not allowed: must be \['k', 'v'\]"):
        load_tables(layer, {"k": table})
    with pytest.raises(InputError, match=r"tables: v of shape \(4, 4, 4\) is not allowed: must be \(5, 4, 4\)"):
        load_tables(layer, {"k": table, "v": table[:4]})
    with pytest.raises(InputError, match="state dict: has no 'to_q'"):
        tables_from_state_dict({}, {"q": "to_q"})
