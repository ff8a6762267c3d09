"""How a plan trains: precision, batch, optimizer, schedule, data, and the ZeRO stage with its knobs."""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

from pydantic import Field, model_validator

from .model_spec import Positive
from .schema import Schema

Precision: TypeAlias = Literal["fp32", "bf16"]
DTYPE_BYTES: dict[str, int] = {"fp32": 4, "bf16": 2}

NonNegative: TypeAlias = Annotated[int, Field(ge=0, strict=True)]
PositiveFloat: TypeAlias = Annotated[float, Field(gt=0)]
NonNegativeFloat: TypeAlias = Annotated[float, Field(ge=0)]


class TrainingSpec(Schema):
    """Everything about training that is not the model or the cluster."""

    precision: Precision = "fp32"
    """Dtype of parameters, activations and collectives; bf16 keeps an fp32 master copy."""
    micro_batch: Positive = 8
    """Samples per rank and forward pass."""
    accumulation: Positive = 1
    """Micro-batches per optimizer step."""
    steps: Positive = 100
    """Optimizer steps of the whole run."""
    warmup_steps: NonNegative = 0
    """Steps of linear warm-up before the cosine decay."""
    learning_rate: PositiveFloat = 1e-3
    weight_decay: NonNegativeFloat = 0.05
    betas: tuple[NonNegativeFloat, NonNegativeFloat] = (0.9, 0.95)
    epsilon: PositiveFloat = 1e-8
    gradient_clipping: NonNegativeFloat = 1.0
    """Largest global L2 norm of the gradients; 0 clips nothing."""
    data: Literal["digits", "synthetic"] = "digits"
    """Handwritten digits (8×8, ten classes), or random samples of the model's shape."""
    seed: NonNegative = 0
    """Of the initial weights and of the order of the samples."""

    @model_validator(mode="after")
    def _check_schedule(self) -> TrainingSpec:
        if self.warmup_steps >= self.steps:
            raise ValueError(f"warmup_steps: {self.warmup_steps} is not allowed: must be below steps {self.steps}")
        if max(self.betas) >= 1:
            raise ValueError(f"betas: {self.betas} is not allowed: must be below 1")
        return self

    @property
    def dtype_bytes(self) -> int:
        """Bytes of one parameter or activation."""
        return DTYPE_BYTES[self.precision]

    def global_batch(self, ranks: int) -> int:
        """Samples per optimizer step over all ranks."""
        return self.micro_batch * self.accumulation * ranks


class ZeroSpec(Schema):
    """The ZeRO stage and the knobs that rule its memory, in elements as DeepSpeed counts them."""

    stage: Literal[0, 1, 2, 3] = 3
    reduce_bucket_elements: Positive = 500_000_000
    prefetch_bucket_elements: NonNegative = 0
    max_live_elements: Positive = 1_000_000_000
    max_reuse_distance_elements: NonNegative = 0
    persistence_threshold_elements: NonNegative = 100_000
    sub_group_elements: Positive = 100_000_000
