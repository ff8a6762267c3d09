"""Load tables of the published code into a layer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from translution.models import AlphaTranslution, Translution, load_published, load_tables, tables_from_state_dict
from translution.planner.common.errors import InputError

CASES = (
    "vit_full_qkv", "vit_full_qkv_0845c3e", "vit_lor_qkv_c3", "vit_lor_qkv_c3_4fb3d5c", "vit_full_kv", "gpt_full_qkv",
    "gpt_full_qkv_b0c2633", "gpt_full_qkv_004d32a", "gpt_lor_qkv_c3",
)  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_loaded_tables_compute_the_published_logits(name: str, root: Path) -> None:
    """Draw the tables of a network anew, load them from the file, and compare with what the authors' code computes."""
    folder = root / "tests" / "data" / "published"
    case = json.loads((folder / f"{name}.json").read_text())
    fields = {key: case[key] for key in ("heads", "image", "patch", "pool") if case.get(key) is not None}
    path = folder / f"{name}.weights.safetensors"
    network = load_published(path, revision=case["revision"], **fields)[1].double()
    state, expected = load_file(path), load_file(folder / f"{name}.expected.safetensors")
    low = "2" if case["operator"] == "alpha" else ""
    for number, block in enumerate(network.blocks):
        layer = block.operator
        assert isinstance(layer, Translution | AlphaTranslution)
        for parameter in layer.tables.parameters():
            torch.nn.init.normal_(parameter)
        keys = {role: f"translution.layers.{number}.0.to_{role}{low}.unique_params" for role in layer.roles}
        load_tables(layer, tables_from_state_dict(state, keys), revision=case["revision"])
    torch.testing.assert_close(network(expected["input"]), expected["logits"], rtol=0, atol=1e-10)


def test_tables_of_the_equations_are_numbered_by_relation() -> None:
    layer = Translution(4, 2, length=3, causal=True, tile_relations=2)
    tables = {role: torch.randn(3, 4, 4) for role in "qkv"}
    load_tables(layer, tables)
    for role, name in (("q", "query"), ("k", "key"), ("v", "value")):
        assert torch.equal(layer.tables.table(name), tables[role])


def test_an_error_names_the_wrong_tables() -> None:
    layer = Translution(4, 2, grid=(1, 3), roles="kv")
    table = torch.zeros(5, 4, 4)
    with pytest.raises(InputError, match=r"roles \['k'\] are not allowed: must be \['k', 'v'\]"):
        load_tables(layer, {"k": table})
    with pytest.raises(InputError, match=r"tables: v of shape \(4, 4, 4\) is not allowed: must be \(5, 4, 4\)"):
        load_tables(layer, {"k": table, "v": table[:4]})
    with pytest.raises(InputError, match="revision: 'abc' is not allowed: must be old, new or a commit"):
        load_tables(layer, {"k": table, "v": table}, revision="abc")
    clip = Translution(4, 2, grid=(2, 1, 2), causal=True, roles="v")
    with pytest.raises(InputError, match="revision: 'new' is not allowed: the published code has causal sequences and"):
        load_tables(clip, {"v": torch.randn(clip.geometry.relations, 4, 4)}, revision="new")
    with pytest.raises(InputError, match="state dict: has no 'to_q'"):
        tables_from_state_dict({}, {"q": "to_q"})
