"""The environment of ranks and of compilers."""

from __future__ import annotations

import os

import pytest

from translution.distributed.system.environment import simplify_gpu_architectures


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("8.0 9.0a", "8.0 9.0"),
        ("9.0a;10.0f+PTX", "9.0;10.0+PTX"),
        ("7.5 8.0 8.6 9.0 10.0 12.0+PTX", "7.5 8.0 8.6 9.0 10.0 12.0+PTX"),
        ("", ""),
        ("Hopper", "Hopper"),
    ],
)
def test_architectures_are_written_as_deepspeed_reads_them(given: str, expected: str) -> None:
    environment = {"TORCH_CUDA_ARCH_LIST": given}
    simplify_gpu_architectures(environment)
    assert environment == {"TORCH_CUDA_ARCH_LIST": expected}


def test_deepspeed_reads_what_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed hands the architectures to torch."""
    from deepspeed.ops.op_builder.builder import CUDAOpBuilder

    class Builder(CUDAOpBuilder):
        """A builder of nothing."""

        def absolute_name(self) -> str:
            """The name of no op."""
            return "nothing"

        def sources(self) -> list[str]:
            """No files."""
            return []

    builder = Builder(name="nothing")
    builder.jit_mode = True
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0 9.0a")
    with pytest.raises(ValueError, match="0a"):
        builder.compute_capability_args()
    simplify_gpu_architectures()
    builder.compute_capability_args()
    assert os.environ["TORCH_CUDA_ARCH_LIST"] == "8.0;9.0+PTX"


def test_no_architectures_are_made_up() -> None:
    environment: dict[str, str] = {}
    simplify_gpu_architectures(environment)
    assert not environment
