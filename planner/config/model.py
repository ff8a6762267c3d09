"""The model families: vision transformers on images or clips, and causal language models.

Sources: arXiv 2510.10060, sections 3 to 5, and the published ViT and GPT code where the paper is silent. Tubelets, the
patches of a clip: arXiv 2103.15691, section 3.2.
"""

from __future__ import annotations

from abc import abstractmethod
from functools import lru_cache
from math import prod
from typing import Annotated, Literal, TypeAlias

from pydantic import BeforeValidator, Field, TypeAdapter, model_validator

from ..common.errors import InputError
from ..common.schema import validate
from .geometry import RelationGeometry, Window
from .model_base import ModelSpecBase, Size, default_ffn_dim


def _pair(value: object) -> object:
    return (value, value) if isinstance(value, int) and not isinstance(value, bool) else value


SizePair: TypeAlias = Annotated[tuple[Size, Size], BeforeValidator(_pair)]


@lru_cache(maxsize=256)
def _grid(extents: tuple[int, ...], patch_extents: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(size // patch for size, patch in zip(extents, patch_extents, strict=True))


@lru_cache(maxsize=256)
def _geometry(
    axes: tuple[int, ...], class_token: bool, causal: bool, window: Window, *, is_sequence: bool = False
) -> RelationGeometry:
    """Return the same geometry for the same arguments: it remembers what it has counted."""
    return RelationGeometry(axes, class_token=class_token, causal=causal, window=window, is_sequence=is_sequence)


class PatchSpec(ModelSpecBase):
    """A classifier of a grid of patches: what `VitSpec` and `VideoSpec` share."""

    channels: Size = 3
    classes: Size
    """Width of the classification head."""
    pool: Literal["class", "mean"] = "class"
    """Input of the classification head: the class token, or the mean of all tokens."""
    class_token: bool = True
    """Prepend a class token to the patches; required for pool class."""
    image: SizePair
    """Image height and width in pixels; one number means a square."""

    def _check_extents(self) -> None:
        for axis, size, patch in zip(self.axis_names, self.extents, self.patch_extents, strict=True):
            if size % patch:
                raise ValueError(
                    f"{self.patch_field}: {patch} is not allowed: must divide the {axis} {size}"
                    f"{_divisors_near(size, patch)}"
                )
        if self.pool == "class" and not self.class_token:
            raise ValueError("class_token: False is not allowed: must be true for pool class")

    @property
    def axis_names(self) -> tuple[str, ...]:
        """Names of the axes in messages."""
        return "image height", "image width"

    @property
    def patch_field(self) -> str:
        """Name of the field that gives the extents of a patch."""
        return "patch"

    @property
    @abstractmethod
    def extents(self) -> tuple[int, ...]:
        """Pixels, and frames, of a sample along each axis."""

    @property
    @abstractmethod
    def patch_extents(self) -> tuple[int, ...]:
        """Pixels, and frames, of a patch along each axis."""

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """Shape of a sample: channels, then the extents."""
        return self.channels, *self.extents

    @property
    def grid(self) -> tuple[int, ...]:
        """Patches along each axis."""
        return _grid(self.extents, self.patch_extents)

    @property
    def patch_dim(self) -> int:
        """Values per patch."""
        return prod(self.patch_extents) * self.channels

    @property
    def geometry(self) -> RelationGeometry:
        """The grid of patches, after the class token if the model has one."""
        return _geometry(self.grid, self.class_token, False, self.window)


class VitSpec(PatchSpec):
    """A vision transformer on patches of an image."""

    family: Literal["vit"]
    patch: SizePair
    """Patch height and width in pixels."""

    @property
    def extents(self) -> tuple[int, ...]:
        """Image height and width in pixels."""
        return self.image

    @property
    def patch_extents(self) -> tuple[int, ...]:
        """Patch height and width in pixels."""
        return self.patch


class VideoSpec(PatchSpec):
    """A vision transformer on tubelets, patches that span several frames of a clip; or on blocks of a volume."""

    family: Literal["video"]
    frames: Size
    """Frames of a clip, or slices of a volume."""
    tubelet: tuple[Size, Size, Size]
    """Frames, height and width of a patch."""
    causal: bool = False
    """Whether a patch sees only its own and earlier frames. The class token sees all frames, and no patch sees it."""

    @property
    def axis_names(self) -> tuple[str, ...]:
        """Names of the axes in messages."""
        return "frames", *super().axis_names

    @property
    def patch_field(self) -> str:
        """Name of the field that gives the extents of a patch."""
        return "tubelet"

    @property
    def extents(self) -> tuple[int, ...]:
        """Frames, height and width of a clip."""
        return self.frames, *self.image

    @property
    def patch_extents(self) -> tuple[int, ...]:
        """Frames, height and width of a patch."""
        return self.tubelet

    @property
    def geometry(self) -> RelationGeometry:
        """The grid of tubelets, after the class token if the model has one."""
        return _geometry(self.grid, self.class_token, self.causal, self.window)


class GptSpec(ModelSpecBase):
    """A causal language model."""

    family: Literal["gpt"]
    context: Size
    """Tokens per sample."""
    vocabulary: Size
    """Number of token types."""
    tied_embeddings: bool = False
    """Whether the head multiplies by the embedding's matrix instead of one of its own."""
    other_causal: bool = True
    """Whether the attention of the other layers is causal. Otherwise they see later tokens, as in the published
    hybrids, and a loss no longer tells how well the model predicts them."""

    @model_validator(mode="after")
    def _check_other_causal(self) -> GptSpec:
        hybrid = self.operator != "attention" and "attention" in self.layer_operators
        if not self.other_causal and not hybrid:
            raise ValueError("other_causal: False is not allowed: must be true without other layers of attention")
        return self

    @property
    def attention_causal(self) -> bool:
        """True if a token of an attention layer sees only itself and earlier ones."""
        return self.other_causal

    @property
    def geometry(self) -> RelationGeometry:
        """A causal sequence of the context's length."""
        return _geometry((self.context,), False, True, self.window, is_sequence=True)


ModelSpec: TypeAlias = VitSpec | GptSpec | VideoSpec
MODEL_SPEC: TypeAdapter[ModelSpec] = TypeAdapter(Annotated[ModelSpec, Field(discriminator="family")])

_FAMILIES: dict[str, type[VitSpec] | type[GptSpec] | type[VideoSpec]] = {
    "vit": VitSpec,
    "gpt": GptSpec,
    "video": VideoSpec,
}


def _divisors_near(size: int, patch: int) -> str:
    near = sorted((n for n in range(1, size + 1) if size % n == 0), key=lambda n: abs(n - patch))[:3]
    return f", such as {', '.join(map(str, sorted(near)))}"


def parse_model_spec(data: object, what: str = "model") -> ModelSpec:
    """Build a spec from the content of a YAML or JSON file.

    Args:
        data: a mapping with ``family: vit``, ``gpt`` or ``video`` and the fields of that family.
        what: opens an error line.

    Raises:
        InputError: naming the first bad field, its value and what is allowed.
    """
    fields: tuple[str, ...] = ()
    if isinstance(data, dict):
        family = data.get("family")
        if not isinstance(family, str) or family not in _FAMILIES:
            said = f"{family!r} is not allowed: must" if "family" in data else "is required: must"
            raise InputError(f"{what}: family: {said} be vit, gpt or video")
        fields = tuple(_FAMILIES[family].model_fields)
    return validate(MODEL_SPEC, data, what, fields)


def override(spec: ModelSpec, /, **values: object) -> ModelSpec:
    """Return a validated copy of a spec with some fields replaced; None leaves a field as it is.

    If ``head_dim`` or ``ffn_dim`` had its default, it gets the default of the new fields.

    Raises:
        InputError: as `parse_model_spec` does.
    """
    changed = {name: value for name, value in values.items() if value is not None}
    if not changed:
        return spec
    data = spec.model_dump()
    if {"dim", "heads"} & set(changed) and spec.head_dim * spec.heads == spec.dim:
        data.pop("head_dim")
    if {"dim", "ffn"} & set(changed) and spec.ffn_dim == default_ffn_dim(spec.dim, spec.ffn):
        data.pop("ffn_dim")
    return parse_model_spec(data | changed, what=spec.name)
