"""The presets of this project as models of timm: ``timm.create_model("translution_vit_tiny_patch56_224")``.

Importing this module needs timm and registers models by operator (``translution`` or ``alpha_translution``), size,
side of a patch and side of the image. Source of timm's names: timm 1.0.31, models/_registry.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from translution.planner.common import InputError, MissingPackageError
from translution.planner.config import Operator, VitSpec, load_model

from ..networks.build import build
from ..networks.vit import VisionTransformer

try:
    from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
    from timm.models import register_model
except ImportError:
    raise MissingPackageError("timm is missing: pip install 'translution-scale[integrations]'") from None

SIZE_NAMES = ("tiny", "mini", "small", "base", "large")
PATCHES = (8, 14, 16, 28, 32, 56)
"""Sides of a patch in pixels; each divides the image's 224."""
_SIDE = 224
_PREFIXES: dict[str, Operator] = {"translution": "translution", "alpha_translution": "alpha"}


class TimmVisionTransformer(nn.Module):
    """A vision transformer with the methods of timm's: images (B, channels, H, W) → logits (B, classes).

    Args:
        spec: the model.
        tile_relations: relations per tile of a table; None stores each table as one Parameter.
    """

    def __init__(self, spec: VitSpec, tile_relations: int | None = None) -> None:
        super().__init__()
        network = build(spec, tile_relations=tile_relations)
        assert isinstance(network, VisionTransformer)
        self.network = network
        self.num_classes = spec.classes
        self.num_features = self.embed_dim = self.head_hidden_size = spec.dim
        self.pretrained_cfg = self.default_cfg = {
            "input_size": spec.sample_shape,
            "num_classes": spec.classes,
            "mean": IMAGENET_DEFAULT_MEAN,
            "std": IMAGENET_DEFAULT_STD,
            "interpolation": "bicubic",
            "crop_pct": 0.9,
            "classifier": "network.head",
        }

    def forward_features(self, x: Tensor) -> Tensor:
        """Images → tokens after the last norm, (B, N, C)."""
        return self.network.features(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens (B, N, C) → logits (B, classes), or the pooled tokens (B, C) with ``pre_logits``."""
        pooled = self.network.pooled(x)
        result: Tensor = pooled if pre_logits else self.network.head(pooled)
        return result

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, H, W) → (B, classes), or (B, C) without classes."""
        return self.forward_head(self.forward_features(x))

    def get_classifier(self) -> nn.Module:
        """Return the head."""
        return self.network.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Give the model a new head; the pooled tokens are the output with zero classes.

        Args:
            num_classes: number of classes, at least 0.
            global_pool: must be None: the spec says how tokens are pooled.
        """
        if global_pool is not None:
            raise InputError(f"global_pool: {global_pool!r} is not allowed: must be None")
        old = self.network.head
        self.num_classes = num_classes
        head: Any = nn.Linear(self.embed_dim, num_classes) if num_classes else nn.Identity()
        weight = next(self.network.parameters())
        self.network.head = head.to(weight.device, weight.dtype).train(old.training)

    def no_weight_decay(self) -> set[str]:
        """Return the names of the Parameters that timm's optimizers must not decay: tokens and positions."""
        return {
            name for name, _ in self.named_parameters() if name.endswith(("class_token.weight", "positions.weight"))
        }


def _entrypoint(name: str, operator: Operator, preset: str) -> Callable[..., TimmVisionTransformer]:
    """Return the function that timm calls to make a model."""

    def make(
        pretrained: bool = False,
        *,
        num_classes: int = 1000,
        in_chans: int = 3,
        img_size: int = _SIDE,
        drop_rate: float = 0.0,
        tile_relations: int | None = None,
        **fields: Any,
    ) -> TimmVisionTransformer:
        if pretrained:
            raise InputError(f"pretrained: True is not allowed: there are no weights of {name}")
        # What timm passes to every model, and this one does not use.
        own = {key: value for key, value in fields.items() if key not in ("pretrained_cfg", "cache_dir")}
        own.pop("pretrained_cfg_overlay", None)
        sizes = {"channels": in_chans, "image": img_size, "classes": max(1, num_classes), "dropout": drop_rate}
        spec = load_model(preset, **({"operator": operator} | sizes | own))
        assert isinstance(spec, VitSpec)
        model = TimmVisionTransformer(spec, tile_relations)
        if num_classes == 0:
            model.reset_classifier(0)
        return model

    make.__name__ = make.__qualname__ = name
    make.__module__ = __name__
    return make


def _register_models() -> None:
    for prefix, operator in _PREFIXES.items():
        for size in SIZE_NAMES:
            for patch in PATCHES:
                name = f"{prefix}_vit_{size}_patch{patch}_{_SIDE}"
                register_model(_entrypoint(name, operator, f"vit-{size}/{patch}"))


_register_models()
