"""States of bitsandbytes' 8-bit AdamW: read from a checkpoint, and quantized again in another layout."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from translution.distributed.checkpoint.reader import MASTER_COPY, FlatVector
from translution.distributed.checkpoint.reshard import _quantize
from translution.planner.config.training import TrainingSpec
from translution.planner.costs.optimizer import CODEBOOK_BYTES, most_state_bytes, state_bytes

if TYPE_CHECKING:
    from bitsandbytes.optim import AdamW8bit

NUMELS = [3000, 4096, 10_001]


def stepped(numel: int) -> tuple[torch.nn.Parameter, AdamW8bit]:
    """A parameter after three updates, and its optimizer."""
    from bitsandbytes.optim import AdamW8bit  # In seconds, and every worker of pytest-xdist imports this file.

    torch.manual_seed(0)
    parameter = torch.nn.Parameter(torch.randn(numel))
    optimizer = AdamW8bit([parameter])
    for _ in range(3):
        parameter.grad = torch.randn(numel)
        optimizer.step()
    return parameter, optimizer


def moments(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Both moments in fp32, by bitsandbytes' own function."""
    if state["state1"].dtype == torch.float32:
        return {"first": state["state1"], "second": state["state2"]}
    from bitsandbytes.functional import dequantize_blockwise

    return {
        kind: dequantize_blockwise(
            state[f"state{number}"], absmax=state[f"absmax{number}"], code=state[f"qmap{number}"], blocksize=256
        )
        for number, kind in ((1, "first"), (2, "second"))
    }


@pytest.mark.parametrize("numel", NUMELS)
def test_moments_are_read_as_bitsandbytes_reads_them(numel: int) -> None:
    parameter, optimizer = stepped(numel)
    saved = optimizer.state_dict()["state"][0]
    vector = FlatVector(parameter.data, saved, Path("none"))
    assert (vector.kinds, vector.step) == (["first", "second"], 3)
    assert torch.equal(vector.read(MASTER_COPY, 5, 9), parameter.data[5:9])
    for kind, expected in moments(optimizer.state[parameter]).items():
        assert torch.equal(vector.read(kind, 0, numel), expected)
        # A piece that begins and ends within a block.
        assert torch.equal(vector.read(kind, 250, 1027), expected[250:1027])


@pytest.mark.parametrize("numel", NUMELS)
def test_quantizing_the_moments_again_gives_nearly_the_same_codes(numel: int) -> None:
    parameter, optimizer = stepped(numel)
    state = optimizer.state[parameter]
    wide = moments(state)
    again = {"state1": wide["first"], "state2": wide["second"], "step": 3}
    _quantize(optimizer, again)
    assert again.keys() == state.keys()
    for name, value in state.items():
        if name.startswith("absmax"):
            # No code stands for -1, so that a scale may become smaller by a hundredth.
            assert torch.allclose(again[name], value, rtol=0.01)
        elif name.startswith("state") and value.dtype == torch.uint8:
            assert (again[name].int() - value.int()).abs().max() <= 1
        else:
            assert torch.equal(torch.as_tensor(again[name]), torch.as_tensor(value))


@pytest.mark.parametrize("numel", NUMELS)
def test_the_bytes_of_the_states_are_counted(numel: int) -> None:
    parameter, optimizer = stepped(numel)
    state = optimizer.state[parameter]
    tensors = [value for value in state.values() if isinstance(value, torch.Tensor)]
    training = TrainingSpec(adam="8bit")
    codebooks = CODEBOOK_BYTES if "qmap1" in state else 0
    assert sum(tensor.nbytes for tensor in tensors) == state_bytes(training, numel) + codebooks
    parts = [numel, 1, 255, 4095, 70_000]
    exact = sum(state_bytes(training, part) for part in parts) + CODEBOOK_BYTES
    assert exact <= most_state_bytes(training, sum(parts), len(parts), 4) < 1.5 * exact
