"""The Triton kernels: in the interpreter they equal the reference, and they compile for a GPU without one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

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
def test_every_kernel_compiles_for_a_gpu_and_keeps_its_tensor_cores_busy(root: Path, tmp_path: Path) -> None:
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    command = [
        sys.executable,
        str(root / "tests" / "programs" / "kernel_code.py"),
        "--first",
        "--json",
        "--roles",
        "kv",
    ]
    command += ["--dtypes", *(dtypes := ("bfloat16", "float16", "float32", "tf32"))]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "Warning" not in done.stderr, done.stdout + done.stderr
    compiled = [json.loads(line) for line in done.stdout.splitlines()]
    kernels = {"logits", "projected_gradients", "values", "matrix_gradients", "input_gradients", "plain_gradients"}
    for dtype in dtypes:
        found = [kernel for kernel in compiled if kernel["dtype"] == dtype]
        assert {kernel["kernel"] for kernel in found} == {f"{name}_kernel" for name in kernels}
        for kernel in found:
            assert kernel["programs_per_sm"] >= 1, kernel
            tables = [value for flag, value in kernel["flags"].items() if flag.endswith("_TABLE")]
            multiplies = any(tables) if tables else kernel["kernel"] != "plain_gradients_kernel"
            assert (kernel["products"] > 0) == (multiplies and dtype != "float32"), kernel
            if kernel["products"] and dtype == "bfloat16":
                check_loop(kernel)


def check_loop(kernel: dict[str, Any]) -> None:
    """Assert that loads start two iterations before their product, and that the tensor cores set the pace."""
    rows, inner, columns = (kernel["config"][name] for name in ("rows", "inner", "columns"))
    operands = {
        "matrix_gradients_kernel": rows * inner + rows * columns,
        "input_gradients_kernel": rows * columns + inner * columns,
    }.get(kernel["kernel"], rows * inner + inner * columns)
    assert kernel["shared_bytes"] >= 3 * 2 * operands, kernel
    assert kernel["issue"] < 0.7, kernel
