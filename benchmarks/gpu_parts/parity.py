"""Versions as torch reports them, and the tests of the operators on the device."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from translution.planner.common import usable_cores

from .machine import Context

ROOT = Path(__file__).resolve().parents[2]
_WORKERS = 8
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


class _Counts:
    """A plugin of pytest that counts the results of the tests."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self.by_outcome: dict[str, int] = {}
        self.failures: list[str] = []

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Count a test when it has run, or when it could not be set up."""
        if report.when != "call" and report.passed:
            return
        self.by_outcome[report.outcome] = self.by_outcome.get(report.outcome, 0) + 1
        if report.failed:
            text = str(report.longrepr).strip().splitlines() or [""]
            self.failures.append(f"{report.nodeid.rpartition('::')[2]}: {text[-1]}"[:300])
        self._context.result.put(tests=self.by_outcome, failures=self.failures[:20])
        self._context.result.say(", ".join(f"{number} {name}" for name, number in self.by_outcome.items()))

    def pytest_collectreport(self, report: Any) -> None:
        """Note a file that cannot be imported."""
        if report.failed:
            self.failures.append(str(report.longrepr).strip().splitlines()[-1][:300])


def check_parity(context: Context) -> None:
    """Run the tests of the operators on the device, and count them; a rehearsal runs some.

    Raises:
        SystemExit: if a test fails, or none ran.
    """
    import pytest

    context.result.put(versions=versions(context.device))
    words = ["-m", "gpu", "-q", "-rf", "--tb=short", "--rootdir", str(ROOT), "-c", str(ROOT / "pyproject.toml")]
    # The tests need neither the fixtures of the others nor their packages, and a new driver may warn.
    words += ["--noconftest", "-p", "no:cacheprovider", "-o", "filterwarnings=default"]
    words += ["-k", "products_equal or a_gpu_is_used"] if context.small else []
    if context.device == "cuda" and importlib.util.find_spec("xdist") is not None:
        # Compiling Triton's kernels takes most of the time.
        words += ["-n", str(max(1, min(_WORKERS, usable_cores() // 2)))]
    counts = _Counts(context)
    code = pytest.main([*words, str(ROOT / TESTS)], plugins=[counts])
    context.result.put(tests=counts.by_outcome, failures=counts.failures[:20])
    if code or not counts.by_outcome.get("passed"):
        raise SystemExit(counts.failures[0] if counts.failures else f"pytest ended with {code}")
