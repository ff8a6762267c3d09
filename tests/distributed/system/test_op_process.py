"""The compilers of a launch end with it, and a killed one blocks no later launch."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.fake_ops import FakeOps, compilers
from helpers.runs import write_plan
from helpers.waiting import PATIENCE_S, wait_until

from translution.distributed.system.compiled_ops import remove_stale_locks
from translution.distributed.system.op_process import simplify_gpu_architectures


@pytest.mark.slow
def test_a_killed_compilation_leaves_no_lock_that_blocks_the_next(
    tmp_path: Path,
) -> None:
    folder, extensions = write_plan(tmp_path / "plan", 1), tmp_path / "extensions"
    command = [sys.executable, "-m", "translution.cli", "launch", str(folder)]
    environment = os.environ | {"TORCH_EXTENSIONS_DIR": str(extensions)}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        locks = wait_until(lambda: list(extensions.glob("**/lock")), process=process)
        (compiling,) = [
            pid for pid in compilers(extensions) if "-c" in arguments_of(pid) and int(parent_of(pid)) == process.pid
        ]
        os.kill(compiling, signal.SIGKILL)
        printed, errors = process.communicate(timeout=PATIENCE_S)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 1
    assert "compiling DeepSpeed's ShareMemComm (1 of 1): about " in printed
    assert "compiled" not in printed
    assert errors.count("\n") == 1
    assert "DeepSpeed's ops do not compile: ShareMemCommBuilder" in errors
    assert not compilers(extensions)
    assert all(lock.exists() for lock in locks)
    assert remove_stale_locks(environment) == locks


def arguments_of(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/cmdline").read_text().split("\0")


def parent_of(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]


def compiling(folder: Path) -> list[int]:
    """Return the compilers of a folder that its stand-in has started."""
    with contextlib.suppress(OSError):
        return [pid for pid in compilers(folder) if arguments_of(pid)[0] == "cat"]
    return []


PREPARE = """
import sys
from pathlib import Path
from translution.distributed.system.compiled_ops import prepare_ops
prepare_ops(["CPUAdamBuilder"], {}, Path(sys.argv[1]))
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_no_compiler_outlives_its_launcher(fake_ops: FakeOps, number: signal.Signals) -> None:
    """A compiler has a process group of its own; the next launch would wait for it in silence."""
    fake_ops.block("CPUAdamBuilder")
    with subprocess.Popen([sys.executable, "-c", PREPARE, str(fake_ops.root / "log")]) as process:
        try:
            wait_until(lambda: compiling(fake_ops.extensions), process=process)
        finally:
            process.send_signal(number)
    wait_until(lambda: not compilers(fake_ops.extensions))


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
