"""Checkpoints are read without their classes, and nothing else in them is."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.runtime.zero.config import ZeroStageEnum

from translution.distributed.checkpoint.unpickle import Fields, load_file
from translution.planner.common.errors import InputError


class Reduced:
    """An object that is pickled as a call."""

    def __init__(self, function: Any, *arguments: object) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Any, tuple[object, ...]]:
        return self.call


def test_members_of_an_enum_are_read_however_python_wrote_them(tmp_path: Path) -> None:
    """Python 3.11.2, which Debian 12 has, writes a member as getattr of its class."""
    path = tmp_path / "enum.pt"
    torch.save({"stage": Reduced(getattr, ZeroStageEnum, "weights"), "value": torch.arange(3)}, path)
    found = load_file(path)
    assert isinstance(found["stage"], Fields)
    assert found["stage"].values == ("weights",)
    assert found["value"].tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    "call", [Reduced(getattr, torch.Tensor, "numpy"), Reduced(getattr, dict, "fromkeys"), Reduced(os.system, "true")]
)
def test_code_in_a_checkpoint_is_refused(call: Reduced, tmp_path: Path) -> None:
    path = tmp_path / "evil.pt"
    torch.save({"x": call}, path)
    with pytest.raises(InputError, match="is not allowed"):
        load_file(path)
