"""How a model is trained, apart from ZeRO: `TrainingSpec`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal, TypeAlias

from pydantic import Field, TypeAdapter, model_validator

from ..common.schema import Schema, stored_as, validate
from ..common.types import (
    DTYPE_BYTES,
    Line,
    NonNegative,
    NonNegativeFloat,
    Positive,
    PositiveFloat,
    Precision,
    UnitFraction,
)
from .datasets import PLACED_DIGITS, READ_FROM_PATH, TEXTS, DataKind

LossKind: TypeAlias = Literal["whole", "chunked", "mixed", "smoothed"]
"""How the loss is computed: from classes or tokens, in chunks of tokens, or from the class probabilities of mixed
images, which may be smoothed."""
Optimizer: TypeAlias = Literal["adamw", "lion", "adagrad", "sgd"]


class TrainingSpec(Schema):
    """How a model is trained, without the model, the cluster and ZeRO."""

    precision: Precision = "fp32"
    """Dtype of parameters, activations and collectives; bf16 and fp16 keep an fp32 master copy."""
    torch_autocast: Literal["bf16"] | None = None
    """Dtype in which torch.autocast computes the products of fp32 parameters; requires precision fp32, in which ranks
    communicate."""
    grad_accum_dtype: Precision | None = None
    """Dtype in which gradients are accumulated until the step; null is the precision."""
    bf16_master: bool = False
    """Keep the master copy and the step's gradients in bf16; requires precision bf16."""
    bf16_states: bool = False
    """Keep the optimizer's moments in bf16; requires bf16_master."""
    micro_batch: Positive = 8
    """Samples per rank and forward pass."""
    gradient_accumulation_steps: Positive = stored_as("accumulation", 1)
    """Micro-batches per optimizer step."""
    steps: Positive = 100
    """Optimizer steps of the whole run."""
    warmup_steps: NonNegative = 0
    """Steps of linear warm-up before the cosine decay."""
    epoch_steps: Positive | None = None
    """Optimizer steps of one epoch; null if nothing happens once per epoch."""
    lr_schedule: Literal["cosine", "cosine-epoch"] = "cosine"
    """How the learning rate falls to zero after the warm-up: along a cosine, in every step or after every epoch."""
    optimizer: Optimizer = "adamw"
    """Optimizer. DeepSpeed's CPU version of adamw, lion or adagrad updates offloaded states."""
    adam: Literal["auto", "fused", "torch", "loop", "8bit"] = "auto"
    """What updates states of adamw that are not offloaded: DeepSpeed's fused kernel, torch's fused kernel, torch's loop
    over tensors, which needs temporaries and no compiler, or bitsandbytes, whose moments have 8 bits per element. auto
    is fused on GPUs and loop on CPUs."""
    learning_rate: PositiveFloat = 1e-3
    weight_decay: NonNegativeFloat = 0.05
    betas: tuple[NonNegativeFloat, NonNegativeFloat] = (0.9, 0.95)
    """Betas of adamw and lion."""
    epsilon: PositiveFloat = 1e-8
    """Epsilon of adamw and adagrad."""
    momentum: NonNegativeFloat = 0.9
    """Momentum of sgd; 0 disables it."""
    gradient_clipping: NonNegativeFloat = 1.0
    """Maximum global L2 norm of the gradients; 0 disables clipping."""
    data: DataKind = "digits"
    """Training data: handwritten digits (filling the image, centred, shifted, shifted by patches, or moving through a
    clip), images in folders, tokens in files, the source code of Python's standard library, or random samples of the
    model's shape."""
    evaluation_data: DataKind | None = None
    """Kind of data whose held-out samples are evaluated; null is the training data."""
    data_path: Line | None = None
    """Folder of images or tokens, as seen by every node."""
    digit_pixels: Positive | None = None
    """Height and width in pixels of a digit that does not fill the image; null is half the image's shorter side."""
    corrupt_limit: NonNegative = 100
    """Number of unreadable images that a rank reports and skips before it fails."""
    token_windows: Literal["consecutive", "random"] = "consecutive"
    """Which windows of a text are trained on: all consecutive ones in random order, or ones that start at random
    tokens. Evaluation always takes consecutive ones."""
    seed: NonNegative = 0
    """Seed of the initial weights and of the sample order."""
    checkpoint_steps: NonNegative = 0
    """Steps between two checkpoints; 0 saves only at the end."""
    checkpoint_minutes: NonNegativeFloat = 0.0
    """Minutes between two checkpoints; 0 disables saving by time."""
    final_checkpoint: bool = True
    """Whether to save after the last step."""
    keep_checkpoints: Positive = 2
    """Number of newest checkpoints that are kept."""
    keep_best: bool = False
    """Whether the checkpoint with the best evaluation is saved and kept too: the highest accuracy, or the lowest loss
    of a language model."""
    loss: Literal["whole", "chunked"] = "whole"
    """How a language model's loss is computed: from all logits of a micro-batch, or in chunks of tokens, so that no
    tensor holds all logits."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Fraction of a target that is spread evenly over all classes, or over the vocabulary."""
    crop_padding: NonNegative = 0
    """Zero pixels added to every side of an image before a random crop of the original size; 0 disables it."""
    crop_scale: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Smallest fraction of an image's area that a random resized crop keeps; 1 disables it."""
    rand_augment_operations: NonNegative = 0
    """Random operations that RandAugment applies to an image of data images; 0 disables it. Source: arXiv
    1909.13719."""
    rand_augment_magnitude: Annotated[int, Field(ge=0, le=30)] = 9
    """Strength of RandAugment's operations, from 0 to 30."""
    flip: UnitFraction = 0.0
    """Probability of a horizontal flip."""
    mixup: NonNegativeFloat = 0.0
    """Alpha of mixup's Beta distribution; 0 disables it. Source: arXiv 1710.09412."""
    cutmix: NonNegativeFloat = 0.0
    """Alpha of cutmix's Beta distribution; 0 disables it. If mixup is on too, each micro-batch gets one of the two at
    random. Source: arXiv 1905.04899."""
    evaluation_crop: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Fraction of a held-out image's shorter side that its centre crop keeps, for data images; 0.875 scales the side
    to 256 pixels and crops 224."""
    evaluation_steps: NonNegative = 0
    """Steps between two evaluations; 0 evaluates only at the end."""
    evaluation_samples: NonNegative | Literal["auto", "none"] = "auto"
    """Number of held-out samples to evaluate, evenly spaced; 0 evaluates all, none does not evaluate. auto evaluates
    no synthetic data, and otherwise as many samples as take a tenth of the training's predicted time."""
    monitor: Literal["none", "csv", "tensorboard", "wandb"] = "none"
    """Additional output of the metrics, by DeepSpeed's monitor."""

    @model_validator(mode="after")
    def _check_schedule(self) -> TrainingSpec:
        if self.warmup_steps >= self.steps:
            raise ValueError(f"warmup_steps: {self.warmup_steps} is not allowed: must be below steps {self.steps}")
        if max(self.betas) >= 1:
            raise ValueError(f"betas: {self.betas} is not allowed: must be below 1")
        if self.momentum >= 1:
            raise ValueError(f"momentum: {self.momentum} is not allowed: must be below 1")
        if self.lr_schedule == "cosine-epoch" and self.epoch_steps is None:
            raise ValueError("epoch_steps: is required with lr_schedule cosine-epoch")
        return self

    @model_validator(mode="after")
    def _check_adam(self) -> TrainingSpec:
        if self.adam != "auto" and self.optimizer != "adamw":
            raise ValueError(f"adam: {self.adam!r} is not allowed: must be auto with optimizer {self.optimizer}")
        if self.quantizes_states and self.bf16_states:
            raise ValueError(f"adam: {self.adam!r} is not allowed: must be auto, fused, torch or loop with bf16_states")
        return self

    @model_validator(mode="after")
    def _check_data(self) -> TrainingSpec:
        kinds = [kind for kind in (self.data, self.evaluation_data) if kind]
        text = " and ".join(dict.fromkeys(kinds))
        read = any(kind in READ_FROM_PATH for kind in kinds)
        if read and not self.data_path:
            raise ValueError(f"data_path: is required with data {text}")
        if self.data_path is not None and not read:
            raise ValueError(f"data_path: {self.data_path!r} is not allowed: must be null with data {text}")
        if self.digit_pixels is not None and not any(kind in PLACED_DIGITS for kind in kinds):
            raise ValueError(f"digit_pixels: {self.digit_pixels} is not allowed: must be null with data {text}")
        return self

    @model_validator(mode="after")
    def _check_crops(self) -> TrainingSpec:
        if self.crop_padding and self.crop_scale < 1:
            raise ValueError(f"crop_scale: {self.crop_scale} is not allowed: must be 1 with crop_padding")
        operations = self.rand_augment_operations
        if operations and self.data != "images":
            raise ValueError(f"rand_augment_operations: {operations} is not allowed: must be 0 with data {self.data}")
        return self

    @model_validator(mode="after")
    def _check_evaluation(self) -> TrainingSpec:
        evaluated = self.evaluation_data or self.data
        if self.evaluation_crop < 1 and evaluated != "images":
            raise ValueError(f"evaluation_crop: {self.evaluation_crop} is not allowed: must be 1 with data {evaluated}")
        if self.token_windows == "random" and self.data not in TEXTS:
            raise ValueError(f"token_windows: 'random' is not allowed: must be consecutive with data {self.data}")
        if self.keep_best and not self.evaluates:
            raise ValueError("keep_best: True is not allowed: held-out samples must be evaluated")
        return self

    @model_validator(mode="after")
    def _check_dtypes(self) -> TrainingSpec:
        if self.grad_accum_dtype not in (None, self.precision, "fp32"):
            allowed = " or ".join(dict.fromkeys((self.precision, "fp32")))
            raise ValueError(f"grad_accum_dtype: {self.grad_accum_dtype!r} is not allowed: must be {allowed}")
        if self.torch_autocast and self.precision != "fp32":
            raise ValueError(
                f"torch_autocast: {self.torch_autocast!r} is not allowed: precision must be fp32, not {self.precision}"
            )
        if self.bf16_master and self.precision != "bf16":
            raise ValueError(f"bf16_master: True is not allowed: precision must be bf16, not {self.precision}")
        if self.bf16_states and not self.bf16_master:
            raise ValueError("bf16_states: True is not allowed: bf16_master must be true too")
        return self

    @property
    def chunks_loss(self) -> bool:
        """Whether the loss is computed in chunks of tokens."""
        return self.loss == "chunked"

    @property
    def loss_kind(self) -> LossKind:
        """How the loss of a micro-batch that is trained on is computed."""
        if self.mixup or self.cutmix:
            return "smoothed" if self.label_smoothing else "mixed"
        return self.loss

    @property
    def quantizes_states(self) -> bool:
        """Whether the optimizer's moments have 8 bits per element."""
        return self.adam == "8bit"

    @property
    def augmentation(self) -> str:
        """Name of the first active augmentation field; empty if there is none."""
        set_ = {"crop_scale": self.crop_scale < 1}
        names = ("crop_padding", "flip", "rand_augment_operations", "mixup", "cutmix")
        set_ |= {name: getattr(self, name) > 0 for name in names}
        return next((name for name, changes in set_.items() if changes), "")

    @property
    def dtype_bytes(self) -> int:
        """Bytes of one parameter or activation."""
        return DTYPE_BYTES[self.precision]

    @property
    def compute_precision(self) -> Precision:
        """Dtype of matrix products."""
        return self.torch_autocast or self.precision

    @property
    def precision_text(self) -> str:
        """Dtype of the parameters, and that of products if it differs."""
        return f"{self.precision}, {self.torch_autocast} autocast" if self.torch_autocast else self.precision

    @property
    def accumulation_dtype(self) -> Precision:
        """Dtype of the accumulated gradients."""
        return self.grad_accum_dtype or self.precision

    @property
    def master_dtype(self) -> Precision:
        """Dtype of the master copy, which the optimizer updates, and of its gradients."""
        return "bf16" if self.bf16_master else "fp32"

    @property
    def states_dtype(self) -> Precision:
        """Dtype of the optimizer's moments."""
        return "bf16" if self.bf16_states else "fp32"

    @property
    def evaluates(self) -> bool:
        """Whether a run evaluates held-out samples."""
        if self.evaluation_samples == "auto":
            return (self.evaluation_data or self.data) != "synthetic"
        return self.evaluation_samples != "none"

    def global_batch(self, world_size: int) -> int:
        """Samples of an optimizer step over all ranks."""
        return self.micro_batch * self.gradient_accumulation_steps * world_size


_TRAINING: TypeAdapter[TrainingSpec] = TypeAdapter(TrainingSpec)


def parse_training(fields: Mapping[str, object], what: str) -> TrainingSpec:
    """Return a validated `TrainingSpec`.

    Args:
        fields: its fields by name.
        what: name of the fields' origin, for error messages.

    Raises:
        InputError: for an unknown field or a bad value.
    """
    return validate(_TRAINING, dict(fields), what, tuple(TrainingSpec.model_fields))
