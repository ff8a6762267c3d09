"""Intervals of bytes and fractions, the items of the device overhead, and a machine's own figures for them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal, TypeAlias

from pydantic import BeforeValidator, Field, TypeAdapter, model_validator

from ..common.phases import Tier
from ..common.schema import Schema, validate

Level: TypeAlias = Literal["low", "likely", "high"]
"""The low end of an interval, its likely value or its high end."""
Bytes: TypeAlias = Annotated[int, Field(ge=0)]
Fraction: TypeAlias = Annotated[float, Field(ge=0, lt=1)]
ESTIMATE = "estimate, not measured"


class ByteInterval(Schema):
    """A low, a likely and a high number of bytes, in ascending order."""

    low_bytes: Bytes
    likely_bytes: Bytes
    high_bytes: Bytes
    source: str = "given by the user"

    @model_validator(mode="after")
    def _ordered(self) -> ByteInterval:
        if not self.low_bytes <= self.likely_bytes <= self.high_bytes:
            raise ValueError(
                f"{self.low_bytes}, {self.likely_bytes}, {self.high_bytes} is not allowed: "
                "low_bytes, likely_bytes and high_bytes must be in ascending order"
            )
        return self


class OverheadItem(ByteInterval):
    """One item of the overhead: memory on a rank's device or host that torch's tensors do not account for."""

    name: str
    tier: Tier = Tier.DEVICE
    in_torch: bool = False
    """Whether torch counts it as allocated memory."""
    formula: str
    """How the bytes are computed, in words."""
    source: str
    """Page, file or code that states the figures."""

    def of(self, level: Level) -> int:
        """Return the bytes at one level."""
        return {"low": self.low_bytes, "likely": self.likely_bytes, "high": self.high_bytes}[level]


class FractionInterval(Schema):
    """A low, a likely and a high fraction, in ascending order."""

    low: Fraction
    likely: Fraction
    high: Fraction
    source: str = "given by the user"

    @model_validator(mode="after")
    def _ordered(self) -> FractionInterval:
        if not self.low <= self.likely <= self.high:
            raise ValueError(
                f"{self.low}, {self.likely}, {self.high} is not allowed: "
                "low, likely and high must be in ascending order"
            )
        return self

    def of(self, level: Level) -> float:
        """Return the fraction at one level."""
        return {"low": self.low, "likely": self.likely, "high": self.high}[level]


def _spread_bytes(data: object) -> object:
    if isinstance(data, int) and not isinstance(data, bool):
        return {"low_bytes": data, "likely_bytes": data, "high_bytes": data}
    return data


def _spread_fraction(data: object) -> object:
    if isinstance(data, int | float) and not isinstance(data, bool):
        return {"low": data, "likely": data, "high": data}
    return data


GivenBytes: TypeAlias = Annotated[ByteInterval, BeforeValidator(_spread_bytes)]
GivenFraction: TypeAlias = Annotated[FractionInterval, BeforeValidator(_spread_fraction)]


class OverheadOverrides(Schema):
    """A machine's own figures: None keeps the item as it is; one number is low, likely and high at once."""

    driver_reserve: GivenBytes | None = None
    context: GivenBytes | None = None
    blas_workspace: GivenBytes | None = None
    nccl: GivenBytes | None = None
    nccl_host: GivenBytes | None = None
    fragmentation: GivenFraction | None = None


_OVERRIDES: TypeAdapter[OverheadOverrides] = TypeAdapter(OverheadOverrides)


def read_overrides(
    data: Mapping[str, object] | OverheadOverrides | None, what: str = "gpu_constants"
) -> OverheadOverrides:
    """Read overrides from a mapping, such as a field of a YAML file.

    Args:
        data: for each name of an item its bytes, or an interval of bytes with a source.
        what: begins the error line.

    Raises:
        InputError: if a key is unknown, or a figure is negative or out of order.
    """
    if isinstance(data, OverheadOverrides):
        return data
    return validate(_OVERRIDES, {} if data is None else data, what, tuple(OverheadOverrides.model_fields))
