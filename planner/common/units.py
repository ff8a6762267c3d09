"""Formatting of bytes, counts and operations for people; the code itself holds plain integers and floats."""

from __future__ import annotations

import contextlib
import re
from fractions import Fraction

KIB, MIB, GIB, TIB = 2**10, 2**20, 2**30, 2**40
FP32_BYTES = 4
"""Bytes of an fp32 element."""


_UNIT_BYTES = {
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": KIB,
    "mib": MIB,
    "gib": GIB,
    "tib": TIB,
}


def parse_bytes(value: object) -> object:
    """Return the bytes of a text with a unit, such as ``512GB``, ``80 GiB`` or ``1.5TB``; other values as they are.

    GB and its like are powers of 1000, GiB and its like powers of 1024.

    Raises:
        ValueError: with the text and what is allowed.
    """
    if not isinstance(value, str):
        return value
    found = re.fullmatch(r"(\d{1,18}(?:\.\d{1,18})?) *([kmgt]?i?b)", value.strip(), re.ASCII | re.IGNORECASE)
    size = found and _UNIT_BYTES.get(found[2].lower())
    if not found or not size:
        raise ValueError(f"{value!r} is not allowed: must be a number of bytes, or one with a unit such as GB or GiB")
    return round(Fraction(found[1]) * size)


def parse_byte_rate(value: object) -> object:
    """Return the bytes per second of a text such as ``450GB/s``; other values as they are.

    Raises:
        ValueError: with the text and what is allowed.
    """
    if not isinstance(value, str):
        return value
    with contextlib.suppress(ValueError):
        return float(value)  # YAML takes 3.0e9 for a text: it wants 3.0e+9.
    size, _, second = map(str.strip, value.partition("/"))
    # 200 Gb/s are bits.
    if second != "s" or not size.endswith("B"):
        raise ValueError(
            f"{value!r} is not allowed: must be a number of bytes per second, or one with a unit such as GB/s"
        )
    return parse_bytes(size)


def format_bytes(count: int) -> str:
    """Return bytes with a binary unit, such as ``1.50 GiB``."""
    for unit, name in ((TIB, "TiB"), (GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if abs(count) >= unit:
            return f"{count / unit:,.2f} {name}" if count < 100 * unit else f"{count / unit:,.0f} {name}"
    return f"{count} B"


def duration_unit(seconds: float) -> tuple[int, str]:
    """Return the seconds and the name of the unit that suits a duration: hours, minutes or seconds."""
    for unit, name in ((3600, "h"), (60, "min")):
        if seconds >= 2 * unit:
            return unit, name
    return 1, "s"


def format_duration(seconds: float) -> str:
    """Return a duration in the unit that suits it, such as ``36.6 s``, ``12.5 min`` or ``7.25 h``."""
    unit, name = duration_unit(seconds)
    return f"{seconds / unit:,.3g} {name}"


def _powers_of_1000(value: float, suffixes: tuple[str, ...]) -> str:
    for exponent in range(len(suffixes), 0, -1):
        if abs(value) >= 1000**exponent:
            scaled = value / 1000**exponent
            return f"{scaled:,.{0 if scaled >= 100 else 2}f} {suffixes[exponent - 1]}"
    return f"{value:,.0f}"


def format_count(count: int) -> str:
    """Return a count in powers of 1000, such as ``15.61 G``."""
    return _powers_of_1000(count, ("k", "M", "G", "T"))


def format_flops(flops: int) -> str:
    """Return floating-point operations in powers of 1000, such as ``1.40 TFLOP``."""
    text = _powers_of_1000(flops, ("k", "M", "G", "T", "P", "E"))
    return f"{text}FLOP" if text[-1].isalpha() else f"{text} FLOP"
