"""The layers in other people's networks, and other people's tables in the layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from translution.models import Translution, load_tables, replace_attention, tables_from_state_dict
from translution.models.ops.naive import relation_index
from translution.planner.common.errors import InputError

pytestmark = pytest.mark.usefixtures("double")


class Attention(nn.Module):
    """The attention of a timm-style block, written for this test."""

    def __init__(self, dim: int, heads: int, bias: bool) -> None:
        super().__init__()
        self.num_heads = heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        out = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        result: Tensor = self.proj(out)
        return result


class Block(nn.Module):
    def __init__(self, dim: int, heads: int, bias: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn: nn.Module = Attention(dim, heads, bias)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        result: Tensor = x + self.mlp(self.norm2(x))
        return result


class SmallViT(nn.Module):
    """8×12 images in 4×4 patches, with a class token."""

    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 12, 4, stride=4)
        self.cls_token = nn.Parameter(torch.randn(1, 1, 12))
        self.blocks = nn.Sequential(*(Block(12, 3, bias) for _ in range(3)))
        self.head = nn.Linear(12, 5)

    def forward(self, image: Tensor) -> Tensor:
        x = self.patches(image).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)
        result: Tensor = self.head(self.blocks(x)[:, 0])
        return result


PLACE: dict[str, Any] = {"grid": (2, 3), "class_token": True}


@pytest.mark.parametrize("options", [{}, {"tile_relations": 4}, {"roles": "kv"}], ids=str)
def test_a_replaced_model_starts_as_it_was_and_then_learns_relations(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model, image = SmallViT(), torch.randn(4, 3, 8, 12)
    before = model(image)
    untouched = model.blocks[2].attn
    assert replace_attention(model, [0, 1], **PLACE, start_from_attention=True, **options) is model
    assert model.blocks[2].attn is untouched
    torch.testing.assert_close(model(image), before, rtol=0, atol=1e-12)
    nn.functional.cross_entropy(model(image), torch.tensor([0, 1, 2, 3])).backward()
    layer = next(module for module in model.modules() if isinstance(module, Translution))
    grads = [parameter.grad for parameter in layer.tables.parameters()]
    assert all(grad is not None and grad.abs().sum() > 0 for grad in grads)


def test_a_replacement_of_its_own_keeps_the_projection_only() -> None:
    torch.manual_seed(0)
    model = SmallViT(bias=True)
    projection = model.blocks[1].attn.get_parameter("proj.weight").clone()
    replace_attention(model, [1], **PLACE)
    layer = next(module for module in model.modules() if isinstance(module, Translution))
    assert torch.equal(layer.output.get_parameter("weight"), projection)
    assert model(torch.randn(2, 3, 8, 12)).shape == (2, 5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layers": [3]}, "layers: 3 is not allowed: must be from 0 to 2"),
        ({"layers": [0], "start_from_attention": True}, "start_from_attention: True is not allowed"),
        ({"layers": [0, 1], "roles": "x"}, "roles: 'x'"),
    ],
    ids=str,
)
def test_a_wrong_replacement_is_named_and_changes_nothing(arguments: dict[str, Any], message: str) -> None:
    model = SmallViT(bias=True)
    before = [block.attn for block in model.blocks]
    with pytest.raises(InputError, match=message):
        replace_attention(model, **(PLACE | arguments))
    assert [block.attn for block in model.blocks] == before


def test_another_kind_of_model_is_named() -> None:
    with pytest.raises(InputError, match="model: Linear is not allowed"):
        replace_attention(nn.Linear(2, 2), [0], **PLACE)


def test_published_tables_load_to_the_published_function() -> None:
    """The published layer's own formula, on its own state dict: there the weight named q multiplies the
    token that is attended to, and the weight named k the token that attends."""
    torch.manual_seed(0)
    heads, dim = 2, 6
    layer = Translution(dim, heads, grid=(2, 3), class_token=True, tile_relations=5)
    relations = layer.geometry.relations
    state = {f"to_{role}.unique_params": torch.randn(relations, dim, dim) for role in "qkv"}
    x = torch.randn(3, 7, dim)

    index = relation_index(layer.geometry)
    rows = {
        role: torch.einsum("bmc,nmce->bnme", x, state[f"to_{role}.unique_params"][index]).unflatten(3, (heads, -1))
        for role in "qkv"
    }
    logits = torch.einsum("bnmhd,bmnhd->bhnm", rows["q"], rows["k"]) * (dim // heads) ** -0.5
    published = torch.einsum("bhnm,bnmhd->bnhd", logits.softmax(-1), rows["v"]).flatten(2)

    names = {role: f"to_{role}.unique_params" for role in "qkv"}
    load_tables(layer, tables_from_state_dict(state, names), published_names=True)
    torch.testing.assert_close(layer(x), layer.output(published), rtol=0, atol=1e-12)


def test_wrong_tables_are_named() -> None:
    layer = Translution(4, 2, length=3, roles="kv")
    table = torch.zeros(5, 4, 4)
    with pytest.raises(InputError, match=r"roles \['k'\] are not allowed: must be \['k', 'v'\]"):
        load_tables(layer, {"k": table})
    with pytest.raises(InputError, match=r"tables: v of shape \(4, 4, 4\) is not allowed: must be \(5, 4, 4\)"):
        load_tables(layer, {"k": table, "v": table[:4]})
    with pytest.raises(InputError, match="state dict: has no 'to_q'"):
        tables_from_state_dict({}, {"q": "to_q"})
