"""The presets as models of timm."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.packages.timm import load_timm
from torch import nn

from translution.planner.common.errors import InputError


@pytest.fixture
def timm() -> Any:
    found = load_timm()
    __import__("translution.models.integrations.timm")
    return found


def test_models_are_made_by_name(timm: Any) -> None:
    assert "translution_vit_tiny_patch56_224" in timm.list_models("translution_*")
    model = timm.create_model("translution_vit_tiny_patch56_224", num_classes=7, in_chans=1, depth=1, roles="kv")
    images = torch.randn(2, 1, 224, 224)
    assert model(images).shape == (2, 7)
    torch.testing.assert_close(model.forward_head(model.forward_features(images)), model(images))
    assert model.default_cfg["input_size"] == (1, 224, 224)
    assert {name.rpartition(".")[0] for name in model.no_weight_decay()} == {"network.class_token"}


def test_a_model_gets_another_head_or_none(timm: Any) -> None:
    model = timm.create_model("alpha_translution_vit_tiny_patch16_224", num_classes=0, img_size=32, depth=1, c1=4)
    images = torch.randn(2, 3, 32, 32)
    assert model(images).shape == (2, 192)
    model.reset_classifier(5)
    assert isinstance(model.get_classifier(), nn.Linear)
    assert model(images).shape == (2, 5)
    with pytest.raises(InputError, match="global_pool: 'avg' is not allowed"):
        model.reset_classifier(5, "avg")


def test_there_are_no_weights(timm: Any) -> None:
    with pytest.raises(InputError, match="pretrained: True is not allowed: there are no weights of translution_vit"):
        timm.create_model("translution_vit_tiny_patch56_224", pretrained=True)
