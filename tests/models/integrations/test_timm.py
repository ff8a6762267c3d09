"""Replace the attention of a timm-style vision transformer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from translution.models import Translution, replace_attention
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


LAYOUT: dict[str, Any] = {"grid": (2, 3), "class_token": True}


@pytest.mark.parametrize("options", [{}, {"tile_relations": 4}, {"roles": "kv"}], ids=str)
def test_a_replaced_model_has_the_same_output_and_then_learns_relations(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model, image = SmallViT(), torch.randn(4, 3, 8, 12)
    before = model(image)
    untouched = model.blocks[2].attn
    assert replace_attention(model, [0, 1], **LAYOUT, start_from_attention=True, **options) is model
    assert model.blocks[2].attn is untouched
    torch.testing.assert_close(model(image), before, rtol=0, atol=1e-12)
    nn.functional.cross_entropy(model(image), torch.tensor([0, 1, 2, 3])).backward()
    layer = next(module for module in model.modules() if isinstance(module, Translution))
    grads = [parameter.grad for parameter in layer.tables.parameters()]
    assert all(grad is not None and grad.abs().sum() > 0 for grad in grads)


def test_a_replacement_takes_over_only_the_projection() -> None:
    torch.manual_seed(0)
    model = SmallViT(bias=True)
    projection = model.blocks[1].attn.get_parameter("proj.weight").clone()
    replace_attention(model, [1], **LAYOUT)
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
def test_an_error_names_the_wrong_argument_and_changes_nothing(arguments: dict[str, Any], message: str) -> None:
    model = SmallViT(bias=True)
    before = [block.attn for block in model.blocks]
    with pytest.raises(InputError, match=message):
        replace_attention(model, **(LAYOUT | arguments))
    assert [block.attn for block in model.blocks] == before


def test_an_error_names_an_unsupported_model() -> None:
    with pytest.raises(InputError, match="model: Linear is not allowed"):
        replace_attention(nn.Linear(2, 2), [0], **LAYOUT)
