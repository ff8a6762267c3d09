"""The Triton kernels: in the interpreter they equal the reference, and they compile for a GPU without one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="needs the package triton")


@pytest.mark.slow
def test_interpreted_kernels_equal_the_reference(root: Path) -> None:
    """The cases are in tests/programs/interpreted_kernels.py: triton must be imported as an interpreter."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", "0",
               str(root / "tests" / "programs" / "interpreted_kernels.py")]  # fmt: skip
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    environment.pop("PYTEST_XDIST_WORKER", None)
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout and "skipped" not in done.stdout


@pytest.mark.slow
def test_every_kernel_compiles_for_a_gpu_within_its_shared_memory(root: Path, tmp_path: Path) -> None:
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path), "TRITON_DEFAULT_FP_FUSION": "1"}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, str(root / "tests" / "programs" / "compile_kernels.py")]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    compiled = [json.loads(line) for line in done.stdout.splitlines()]
    kernels = {"logits", "projected_gradients", "values", "matrix_gradients", "input_gradients", "plain_gradients"}
    for dtype in ("bfloat16", "float16", "float32", "float32 as tf32"):
        found = [kernel for kernel in compiled if kernel["dtype"] == dtype]
        assert {kernel["name"] for kernel in found} == {f"{name}_kernel" for name in kernels}
        for kernel in found:
            assert kernel["shared_bytes"] <= 227 * 1024, kernel
            on_tensor_cores = kernel["multiplies"] and dtype != "float32"
            assert (kernel["tensor_core_products"] > 0) == on_tensor_cores, kernel
