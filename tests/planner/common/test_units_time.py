"""Durations in the unit that suits them."""

from __future__ import annotations

import pytest

from translution.planner.common.units import format_duration


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "0 s"),
        (36.64, "36.6 s"),
        (119.4, "119 s"),
        (120, "2 min"),
        (750, "12.5 min"),
        (7200, "2 h"),
        (1e6, "278 h"),
    ],
)
def test_a_duration_has_a_fitting_unit(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text
