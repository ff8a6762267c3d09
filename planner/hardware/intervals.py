"""An entry of what a device holds beside torch's tensors, and the figures that replace it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal, TypeAlias

from pydantic import BeforeValidator, Field, TypeAdapter, model_validator

from ..common.phases import Tier
from ..common.schema import Schema, validate

Level: TypeAlias = Literal["low", "likely", "high"]
"""An end of an interval, or what is thought the most likely."""
Bytes: TypeAlias = Annotated[int, Field(ge=0)]
Fraction: TypeAlias = Annotated[float, Field(ge=0, lt=1)]
ESTIMATE = "estimate, not measured"


class ByteInterval(Schema):
    """Three numbers of bytes that do not fall."""

    low_bytes: Bytes
    likely_bytes: Bytes
    high_bytes: Bytes
    source: str = "given by the user"

    @model_validator(mode="after")
    def _ordered(self) -> ByteInterval:
        if not self.low_bytes <= self.likely_bytes <= self.high_bytes:
            raise ValueError(
                f"{self.low_bytes}, {self.likely_bytes}, {self.high_bytes} is not allowed: "
                "low_bytes, likely_bytes and high_bytes must not fall"
            )
        return self


class OverheadItem(ByteInterval):
    """One thing that takes memory of a rank's device, or of its host."""

    name: str
    tier: Tier = Tier.DEVICE
    in_torch: bool = False
    """Whether torch counts it as allocated."""
    formula: str
    source: str

    def of(self, level: Level) -> int:
        """Bytes at one level."""
        return {"low": self.low_bytes, "likely": self.likely_bytes, "high": self.high_bytes}[level]


class FractionInterval(Schema):
    """Three shares that do not fall."""

    low: Fraction
    likely: Fraction
    high: Fraction
    source: str = "given by the user"

    @model_validator(mode="after")
    def _ordered(self) -> FractionInterval:
        if not self.low <= self.likely <= self.high:
            raise ValueError(
                f"{self.low}, {self.likely}, {self.high} is not allowed: low, likely and high must not fall"
            )
        return self

    def of(self, level: Level) -> float:
        """The share at one level."""
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
    """A machine's own figures; None leaves an entry as it is, and one number stands for all three."""

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
    """Overrides from a mapping, such as a field of a YAML file.

    Args:
        data: entries' names to bytes, or to three of them and their source.
        what: opens the error line.

    Raises:
        InputError: for an unknown key, or a figure that is negative or out of order.
    """
    if isinstance(data, OverheadOverrides):
        return data
    return validate(_OVERRIDES, {} if data is None else data, what, tuple(OverheadOverrides.model_fields))
