"""Versions as torch reports them, and the tests of the operators on the device."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from .machine import Context

ROOT = Path(__file__).resolve().parents[2]
TESTS = "tests/models/ops/test_batched_gpu.py"


def versions(device: str) -> dict[str, Any]:
    """Return the versions and the device's properties that torch reports."""
    import torch

    found: dict[str, Any] = {"torch": torch.__version__, "cuda": torch.version.cuda}
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "device": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "total_bytes": properties.total_memory,
            "cudnn": torch.backends.cudnn.version(),
            "nccl": ".".join(map(str, torch.cuda.nccl.version())),
        }
    return found


def check_parity(context: Context) -> None:
    """Run the tests of the operators on the device in a process of their own, and count them.

    Raises:
        SystemExit: if a test fails, or none ran.
    """
    context.result.put(versions=versions(context.device))
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-rf", "--tb=short", TESTS]
    # The tests need neither the fixtures of the others nor their packages, and a new driver may warn.
    command += ["--noconftest", "-p", "no:cacheprovider", "-o", "filterwarnings=default"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            context.result.note(line.rstrip())
            lines.append(line.rstrip())
    counts = {name: int(number) for number, name in re.findall(r"(\d+) (passed|failed|errors?|skipped)", lines[-1])}
    failures = [line[:300] for line in lines if line.startswith(("FAILED", "ERROR"))][:20]
    context.result.put(tests=counts, failures=failures)
    context.result.say(", ".join(f"{number} {name}" for name, number in counts.items()))
    if process.returncode or not counts.get("passed"):
        raise SystemExit(failures[0] if failures else f"pytest ended with {process.returncode}: {lines[-1]}")
