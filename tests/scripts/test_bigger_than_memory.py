"""The run that is bigger than memory: what it plans, when it refuses, and what its report says."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from translution.planner.hardware.cluster import local_cpu_cluster

RECORD = "reports/bigger_than_memory.json"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    path = Path(__file__).resolve().parents[2] / "scripts" / "bigger_than_memory.py"
    spec = importlib.util.spec_from_file_location("bigger_than_memory", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def steps_before_and_after() -> list[dict[str, Any]]:
    numbers = [*range(1, 8), *range(6, 11)]
    return [{"step": number, "loss": 1 / number, "grad_norm": 3 / number} for number in numbers]


def test_the_smallest_depth_beyond_the_memory_is_chosen(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script, "total_memory_bytes", lambda: 24 * 2**30)
    plan = script.choose_plan(script.MODEL, local_cpu_cluster(2), None, tmp_path, tmp_path)
    assert plan.model.depth == 6
    assert script.state_bytes(plan) >= 1.5 * 24 * 2**30
    less = script.make_plan(script.MODEL, local_cpu_cluster(2), 5, tmp_path, tmp_path)
    assert script.state_bytes(less) < 1.5 * 24 * 2**30
    # Parameters, master copy, two moments and gradients in fp32.
    assert script.state_bytes(plan) == pytest.approx(20 * 1.95e9, rel=0.01)
    assert script.sub_groups(plan) >= 20
    assert plan.evaluation is None


def test_repeated_steps_are_compared_bit_for_bit(script: ModuleType) -> None:
    steps = steps_before_and_after()
    assert script.find_differences(steps) == []
    steps[-4]["grad_norm"] += 1e-16
    assert script.find_differences(steps) == [
        f"step 7: grad_norm {3 / 7!r} before the kill, {3 / 7 + 1e-16!r} after resuming"
    ]
    with pytest.raises(SystemExit, match="were done, not"):
        script.find_differences(steps[:-1])


def test_a_run_that_does_not_fit_is_refused_with_what_would_suffice(root: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(root / "scripts" / "bigger_than_memory.py"), "--folder", str(tmp_path / "run")]
    options = ["--cluster", "cpu:2", "--depth", "200", "--out", str(tmp_path / "out")]
    done = subprocess.run([*command, *options], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    assert "needed" in done.stderr or "does not fit" in done.stderr
    assert "use" in done.stderr
    assert not (tmp_path / "out").exists()


def test_the_committed_report_is_that_of_its_record(script: ModuleType, root: Path) -> None:
    document = json.loads((root / RECORD).read_text())
    assert script.markdown(document) == (root / RECORD).with_suffix(".md").read_text()
    assert document["differences"] == script.find_differences(document["steps"]) == []
    assert document["state_bytes"] >= 1.5 * document["machine"]["memory_bytes"]
    assert document["sub_groups"] >= 20
    for row in document["memory"]:
        assert 1.0 <= row["ratio"] <= 1.1, row
