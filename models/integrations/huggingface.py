"""The networks as `PreTrainedModel`s of Hugging Face's transformers, for its Trainer and `from_pretrained`.

Importing this module needs transformers and registers the classes with its Auto classes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from translution.planner.common import InputError, MissingPackageError
from translution.planner.config import GptSpec, ModelSpec, load_model

from ..layers.attention import RotaryEmbedding
from ..layers.tables import Tile
from ..networks.blocks import LearnedTokens
from ..networks.build import build

try:
    import transformers
    from transformers import PreTrainedConfig, PreTrainedModel
    from transformers import initialization as initial
    from transformers.modeling_outputs import CausalLMOutput, ImageClassifierOutput
except ImportError:
    raise MissingPackageError("transformers is missing: pip install 'translution-scale[integrations]'") from None


class TranslutionConfig(PreTrainedConfig):
    """Configuration of a network of this project: its spec and how its tables are tiled.

    Args:
        spec: the model as `load_model` takes it: the name of a preset, a file, a mapping or a spec.
        tile_relations: relations per tile of a table; None stores each table as one Parameter.
        options: further arguments of `PreTrainedConfig`.

    Raises:
        InputError: for a spec that is not valid.
    """

    model_type = "translution"

    def __init__(
        self,
        spec: ModelSpec | Mapping[str, object] | str = "vit-tiny/56",
        tile_relations: int | None = None,
        **options: Any,
    ) -> None:
        model = load_model(spec)
        if isinstance(model, GptSpec):
            options["tie_word_embeddings"] = model.tied_embeddings
        elif options.get("id2label") is None:
            options["num_labels"] = model.classes
        super().__init__(**options)
        self.spec = model.model_dump(mode="json", by_alias=True, exclude_none=True)
        self.tile_relations = tile_relations
        self.hidden_size = model.dim

    @property
    def model(self) -> ModelSpec:
        """The spec of the network."""
        return load_model(self.spec)


class TranslutionPreTrainedModel(PreTrainedModel):
    """Base class: a network of this project in ``network``."""

    config_class = TranslutionConfig
    base_model_prefix = "network"
    families: ClassVar[tuple[str, ...]] = ()
    """Families of networks that the class takes."""

    def __init__(self, config: TranslutionConfig) -> None:
        super().__init__(config)
        if (family := config.model.family) not in self.families:
            raise InputError(f"family: {family!r} is not allowed: must be {' or '.join(self.families)}")
        self.network = build(config.model, tile_relations=config.tile_relations)
        for parameter in self.parameters():
            if not parameter.is_meta:
                # transformers would draw these values again, with other deviations.
                parameter._is_hf_initialized = True  # type: ignore[attr-defined]
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Give values to what a loaded file lacks, and compute rotary angles, which no file has."""
        if isinstance(module, RotaryEmbedding):
            module.reset()
        elif isinstance(module, Tile):
            for weight in module.parameters(recurse=False):
                initial.kaiming_uniform_(weight, a=math.sqrt(5))
        elif isinstance(module, LearnedTokens):
            initial.normal_(module.weight, std=0.02)
        else:
            super()._init_weights(module)


class TranslutionForImageClassification(TranslutionPreTrainedModel):
    """A vision transformer: images (B, channels, H, W) or clips (B, channels, frames, H, W) → logits (B, classes).

    Args:
        config: its spec must be a vision transformer's.

    Raises:
        InputError: for a language model's spec.
    """

    main_input_name = "pixel_values"
    families = ("vit", "video")

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> ImageClassifierOutput:
        """Return the logits, and the mean cross-entropy if there are labels.

        Args:
            pixel_values: images or clips.
            labels: (B,), class indices.
        """
        logits = self.network(pixel_values)
        loss = None if labels is None else nn.functional.cross_entropy(logits.float(), labels)
        return ImageClassifierOutput(loss=loss, logits=logits)


class TranslutionForCausalLM(TranslutionPreTrainedModel):
    """A language model: token ids (B, N) → logits (B, N, vocabulary), N at most the context.

    Args:
        config: its spec must be a language model's.

    Raises:
        InputError: for another spec.
    """

    families = ("gpt",)
    _tied_weights_keys = {"network.head.weight": "network.embedding.weight"}  # noqa: RUF012 # transformers reads it

    def get_input_embeddings(self) -> nn.Module:
        """Return the embedding of the tokens."""
        return self.network.embedding

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> CausalLMOutput:
        """Return the logits, and the mean cross-entropy of the next tokens if there are labels.

        Fewer tokens than the context are padded at the end, which no earlier token sees.

        Args:
            input_ids: (B, N).
            labels: (B, N), the same ids, or -100 where there is no loss; the model compares position n with the
                label of n + 1.

        Raises:
            InputError: for more tokens than the context, or fewer if the model is not causal.
        """
        model = self.config.model
        tokens, missing = input_ids.shape[1], model.context - input_ids.shape[1]
        if missing < 0 or (missing and not model.attention_causal):
            allowed = f"at most {model.context}" if model.attention_causal else str(model.context)
            raise InputError(f"input_ids: {tokens} tokens are not allowed: must be {allowed}")
        padded = nn.functional.pad(input_ids, (0, missing)) if missing else input_ids
        logits = self.network(padded)[:, :tokens]
        loss = None
        if labels is not None:
            loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
        return CausalLMOutput(loss=loss, logits=logits)


transformers.AutoConfig.register(TranslutionConfig.model_type, TranslutionConfig)
transformers.AutoModelForImageClassification.register(TranslutionConfig, TranslutionForImageClassification)
transformers.AutoModelForCausalLM.register(TranslutionConfig, TranslutionForCausalLM)
