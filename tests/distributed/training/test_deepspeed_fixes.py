"""Reading a gradient's file into any place of a buffer; tests/integration/test_offload.py trains with the patch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from translution.distributed.training.deepspeed_fixes import is_aligned, read_file


def test_a_file_is_read_into_an_unaligned_part_of_a_buffer(tmp_path: Path) -> None:
    values = torch.randn(5000)
    path = tmp_path / "gradient"
    path.write_bytes(values.numpy().tobytes())
    # Allocations are not page-aligned in general, so the aligned offset is computed.
    buffer = torch.full((8192,), torch.nan)
    start = (-buffer.data_ptr() % 4096) // 4
    assert is_aligned(buffer[start:])
    assert not is_aligned(buffer[start + 1 :])
    read_file(str(path), buffer[start + 1 : start + 5001])
    assert torch.equal(buffer[start + 1 : start + 5001], values)
    assert buffer[: start + 1].isnan().all()
    assert buffer[start + 5001 :].isnan().all()


def test_a_file_that_is_too_short_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "gradient"
    path.write_bytes(bytes(100))
    with pytest.raises(OSError, match=f"{path}: ends after 100 of 400 bytes"):
        read_file(str(path), torch.empty(100))
