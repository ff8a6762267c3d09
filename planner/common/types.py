"""Constrained numbers and dtypes that specs share."""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

from pydantic import Field

Positive: TypeAlias = Annotated[int, Field(ge=1, le=2**60, strict=True)]
NonNegative: TypeAlias = Annotated[int, Field(ge=0, strict=True)]
PositiveFloat: TypeAlias = Annotated[float, Field(gt=0)]
NonNegativeFloat: TypeAlias = Annotated[float, Field(ge=0)]
UnitFraction: TypeAlias = Annotated[float, Field(ge=0, le=1)]

Precision: TypeAlias = Literal["fp32", "bf16", "fp16"]
"""Dtype of parameters and activations."""
DTYPE_BYTES: dict[str, int] = {"fp32": 4, "bf16": 2, "fp16": 2}
