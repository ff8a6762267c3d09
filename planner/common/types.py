"""Constrained numbers, texts and dtypes that specs share."""

from __future__ import annotations

import re
from typing import Annotated, Literal, TypeAlias

from pydantic import AfterValidator, BeforeValidator, Field

from .units import parse_byte_rate, parse_bytes

Positive: TypeAlias = Annotated[int, Field(ge=1, le=2**60, strict=True)]
NonNegative: TypeAlias = Annotated[int, Field(ge=0, le=2**60, strict=True)]
ByteCount: TypeAlias = Annotated[int, BeforeValidator(parse_bytes), Field(ge=1, le=2**60, strict=True)]
"""Bytes, also as text with a unit, as `parse_bytes` reads it."""
ByteRate: TypeAlias = Annotated[float, BeforeValidator(parse_byte_rate), Field(gt=0)]
"""Bytes per second, also as text with a unit, as `parse_byte_rate` reads it."""
PositiveFloat: TypeAlias = Annotated[float, Field(gt=0)]
NonNegativeFloat: TypeAlias = Annotated[float, Field(ge=0)]
UnitFraction: TypeAlias = Annotated[float, Field(ge=0, le=1)]

# Control characters, line and paragraph separators, marks that turn the direction of the text, and lone surrogates.
_UNPRINTABLE = re.compile("[\\x00-\\x1f\\x7f-\\x9f\\u2028\\u2029\\u202a-\\u202e\\u2066-\\u2069\\ud800-\\udfff]")


def check_line(text: str) -> str:
    """Return a text if it is one line of printable characters; spaces and quotes are allowed.

    Names and paths go into messages, pages, scripts and names of files, where a line break would end a line and an
    escape sequence would reach the terminal.

    Raises:
        ValueError: with the value and what is allowed.
    """
    if text.isprintable() or (found := _UNPRINTABLE.search(text)) is None:
        return text
    start, end = max(0, found.start() - 40), found.end() + 20
    shown = f"{'...' if start else ''}{text[start:end]}{'...' if end < len(text) else ''}"
    raise ValueError(f"{shown!r} is not allowed: must be one line without control characters")


def printable(text: str) -> str:
    """Return a text whose control characters are written as Python writes them in a literal."""
    return _UNPRINTABLE.sub(lambda match: repr(match[0])[1:-1], text)


Line: TypeAlias = Annotated[str, AfterValidator(check_line)]
"""A name or a path, as `check_line` allows it."""

Precision: TypeAlias = Literal["fp32", "bf16", "fp16"]
"""Dtype of parameters and activations."""
DTYPE_BYTES: dict[str, int] = {"fp32": 4, "bf16": 2, "fp16": 2}
