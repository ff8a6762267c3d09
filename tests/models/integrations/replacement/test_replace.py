"""Replace the attention of vision transformers: timm's and Hugging Face's, and one that is written like theirs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from helpers.packages.timm import load_timm
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
@pytest.mark.parametrize("bias", [False, True])
def test_a_replaced_model_has_the_same_output_and_then_learns_relations(bias: bool, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model, image = SmallViT(bias), torch.randn(4, 3, 8, 12)
    before = model(image)
    untouched = model.blocks[2].attn
    assert replace_attention(model, [0, 1], **LAYOUT, start_from_attention=True, **options) is model
    assert model.blocks[2].attn is untouched
    torch.testing.assert_close(model(image), before, rtol=0, atol=1e-12)
    nn.functional.cross_entropy(model(image), torch.tensor([0, 1, 2, 3])).backward()
    layer = next(module for module in model.modules() if isinstance(module, Translution))
    grads = [parameter.grad for parameter in layer.parameters()]
    assert len(grads) >= 5
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
        ({"layers": [0], "grid": None}, "grid: None is not allowed: SmallViT does not tell it"),
        ({"layers": [0], "grid": None, "class_token": None}, "grid: None is not allowed: give the height and width"),
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


SMALL: dict[str, Any] = {"img_size": 48, "embed_dim": 24, "depth": 2, "num_heads": 3}
TIMM: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("vit_tiny_patch16_224", SMALL),
    "one head": ("vit_tiny_patch16_224", SMALL | {"num_heads": 1}),
    "not square": ("vit_tiny_patch16_224", SMALL | {"img_size": (32, 64)}),
    "registers": ("vit_tiny_patch16_224", SMALL | {"reg_tokens": 4}),
    "no class token": ("vit_tiny_patch16_224", SMALL | {"class_token": False, "global_pool": "avg"}),
    "deit": ("deit_tiny_distilled_patch16_224", SMALL),
    # Windows of 7 x 7 on a grid of 14 x 14, every second block with shifted windows.
    "swin": ("swin_tiny_patch4_window7_224", {"img_size": 56, "embed_dim": 12, "depths": (2, 2), "num_heads": (2, 4)}),
}


def randomized(model: Any) -> Any:
    """Give every Parameter random values: biases are zero at first, which would hide them."""
    torch.manual_seed(1)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.eval()


def timm_model(name: str, **options: Any) -> Any:
    kind, sizes = TIMM[name]
    model = randomized(load_timm().create_model(kind, num_classes=5, pretrained=False, **(sizes | options)))
    side = sizes["img_size"]
    return model, torch.randn(2, 3, *(side if isinstance(side, tuple) else (side, side)))


def hugging_face_model(name: str) -> Any:
    sizes: dict[str, Any] = {"num_channels": 3, "num_labels": 5}
    if name == "swin":
        sizes |= {"image_size": 56, "patch_size": 4, "embed_dim": 12, "depths": [2, 2], "num_heads": [2, 4]}
        found: Any = transformers.SwinForImageClassification(transformers.SwinConfig(window_size=7, **sizes))
    else:
        sizes |= {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 48}
        sizes |= {"image_size": 48, "patch_size": 16}
        if name == "vit":
            found = transformers.ViTForImageClassification(transformers.ViTConfig(**sizes))
        else:
            found = transformers.DeiTForImageClassification(transformers.DeiTConfig(**sizes))
    side = sizes["image_size"]
    return randomized(found), torch.randn(2, 3, side, side)


def replaced_layers(model: nn.Module) -> list[Translution]:
    return [module for module in model.modules() if isinstance(module, Translution)]


@pytest.mark.parametrize("roles", ["qkv", "kv", "q", "v"])
@pytest.mark.parametrize("name", TIMM)
def test_networks_of_timm_compute_the_same(name: str, roles: str) -> None:
    model, image = timm_model(name)
    before = model(image)
    blocks = 4 if name == "swin" else 2
    replace_attention(model, range(blocks), start_from_attention=True, roles=roles)
    assert len(replaced_layers(model)) == blocks
    torch.testing.assert_close(model(image), before, rtol=0, atol=1e-12)
    for layer in replaced_layers(model):
        # Every term matters: without the biases of the queries the output is another.
        nn.init.zeros_(layer.get_parameter("key_term.weight"))
    assert (model(image) - before).abs().max() > 1e-6


@pytest.mark.parametrize("name", ["vit", "deit", "swin"])
def test_networks_of_hugging_face_compute_the_same(name: str) -> None:
    model, image = hugging_face_model(name)
    before = model(image).logits
    blocks = 4 if name == "swin" else 2
    replace_attention(model, range(blocks), start_from_attention=True)
    assert len(replaced_layers(model)) == blocks
    torch.testing.assert_close(model(image).logits, before, rtol=0, atol=1e-12)
    model.train()(image, labels=torch.tensor([0, 1])).loss.backward()
    assert all(parameter.grad is not None for layer in replaced_layers(model) for parameter in layer.parameters())


def test_a_mask_and_causality_mean_the_same() -> None:
    model, _ = timm_model("vit")
    attention, x = model.blocks[0].attn, torch.randn(2, 10, 24)
    mask = torch.randn(2, 1, 10, 10).masked_fill_(torch.rand(2, 1, 10, 10) < 0.2, -torch.inf)
    mask.diagonal(dim1=2, dim2=3).zero_()
    calls: list[dict[str, Any]] = [{"attn_mask": mask}, {"attn_mask": mask > -1}, {"attn_mask": mask[0, 0]}, {}]
    newest = "is_causal" in type(attention).forward.__code__.co_varnames
    calls += [{"is_causal": True}] if newest else []
    expected = [attention(x, **call) for call in calls]
    replace_attention(model, [0], start_from_attention=True)
    for call, result in zip(calls, expected, strict=True):
        torch.testing.assert_close(model.blocks[0].attn(x, **call), result, rtol=0, atol=1e-12)


def test_the_dropouts_of_the_attention_are_kept() -> None:
    model, _ = timm_model("vit", attn_drop_rate=0.25, proj_drop_rate=0.5)
    replace_attention(model, [0])
    assert replaced_layers(model)[0].dropout == 0.25
    assert isinstance(model.blocks[0].attn.drop, nn.Dropout)
    assert model.blocks[0].attn.drop.p == 0.5


@pytest.mark.parametrize("options", [{"qk_norm": True}, {"scale_attn_norm": True}], ids=str)
def test_an_attention_that_is_more_than_projections_is_refused(options: dict[str, Any]) -> None:
    model, image = timm_model("vit", **options)
    with pytest.raises(InputError, match=r"must be False where the attention has a .*norm \(block 1\)"):
        replace_attention(model, [1], start_from_attention=True)
    replace_attention(model, [1])
    assert model(image).shape == (2, 5)
