"""Checkpoints are read without their classes, and nothing else in them is."""

from __future__ import annotations

import importlib
import os
import warnings
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.runtime.zero.config import ZeroStageEnum

from translution.distributed.checkpoint.unpickle import Fields, load_file, require_harmless
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


class Program(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 1


def test_archives_that_torch_would_run_or_read_in_two_ways_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "program.pt"
    torch.jit.save(torch.jit.script(Program()), str(path))
    with pytest.raises(InputError, match="it is a TorchScript archive, which is a program"):
        load_file(path)
    torch.save({"x": torch.ones(2)}, path)
    with zipfile.ZipFile(path, "a") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        archive.writestr(archive.namelist()[0], b"another")
    with pytest.raises(InputError, match="two members have one name"):
        load_file(path)
    torch.save({"x": Reduced(os.system, "true")}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(InputError, match="File is not a zip file"):
        load_file(path)


@pytest.mark.parametrize("function", ["deepspeed.utils.nvtx.instrument_w_nvtx", "deepspeed.init_distributed"])
def test_other_names_of_deepspeed_are_refused(function: str, tmp_path: Path) -> None:
    """DeepSpeed itself would call them."""
    module, _, name = function.rpartition(".")
    path = tmp_path / "step_1" / "mp_rank_00_model_states.pt"
    path.parent.mkdir()
    torch.save({"x": Reduced(getattr(importlib.import_module(module), name))}, path)
    with pytest.raises(
        InputError, match=r"mp_rank_00_model_states.pt: cannot be read: .* is not allowed in a checkpoint"
    ):
        require_harmless(path.parent)
