"""A call that `torch.compile` leaves alone. To import this module loads torch's compiler, which takes a second."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

Result = TypeVar("Result")


@torch.compiler.disable  # type: ignore[untyped-decorator]  # torch leaves it untyped
def call_eagerly(function: Callable[..., Result], *arguments: object) -> Result:
    """Call a function without compiling it or what it calls."""
    return function(*arguments)
