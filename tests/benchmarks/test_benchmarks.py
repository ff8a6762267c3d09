"""Benchmarks check parity before they print timings, and name the machine that they ran on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.waiting import PATIENCE_S

ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1"}
"""Environment with one thread: on a busy machine torch's threads mostly wait for each other."""


def run_script(root: Path, name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(root / "benchmarks" / name), *arguments]
    return subprocess.run(command, env=ONE_THREAD, capture_output=True, text=True, timeout=PATIENCE_S)


def test_the_gpu_benchmark_runs_at_small_size_on_a_cpu(root: Path, tmp_path: Path) -> None:
    done = run_script(root, "gpu.py", "--small", "--repeats", "1", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    document = json.loads((tmp_path / "gpu.json").read_text())
    assert document["parity"] <= 1e-10
    assert document["half_parity"] <= 1
    assert document["machine"]["torch"] == torch.__version__
    for row in document["results"]:
        assert row["seconds"] > 0
        # α-Translution has no gathered implementation to compare with.
        assert row.get("times_smaller", 9) > 2 and ("times_smaller" in row) == ("α" not in row["case"])
        assert f"| {row['case']} | {row['batch']} |" in done.stdout
    assert (tmp_path / "gpu.md").read_text().strip() == done.stdout.strip()


@pytest.mark.skipif(torch.cuda.is_available(), reason="tests the message on a machine without a GPU")
def test_the_gpu_benchmark_reports_a_missing_gpu_in_one_line(root: Path) -> None:
    done = run_script(root, "gpu.py")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert "no CUDA GPU on this machine" in done.stderr


@pytest.mark.parametrize("script", ["gpu.py", "operator.py"])
def test_timings_of_a_wrong_layer_are_not_printed(script: str, root: Path, tmp_path: Path) -> None:
    wrong = tmp_path / "sitecustomize.py"
    wrong.write_text(
        "import translution.models.layers.tables as tiles\n"
        "true = tiles.gather_attention\n"
        "tiles.gather_attention = lambda *a: tuple(x if x is None else x * 1.001 for x in true(*a))\n"
    )
    command = f"import sys, runpy; sys.path.insert(0, {str(tmp_path)!r}); import sitecustomize as s; "
    command += f"exec(open({str(wrong)!r}).read()); sys.argv = ['x', '--repeats', '1']; "
    command += "sys.argv += ['--small'] if 'gpu' in sys.orig_argv[-1] else ['--case', 'ViT-A/56']; "
    command += f"sys.path.insert(0, {str(root / 'benchmarks')!r}); "
    command += f"runpy.run_path({str(root / 'benchmarks' / script)!r}, run_name='__main__')"
    arguments = [sys.executable, "-c", command, script]
    done = subprocess.run(arguments, env=ONE_THREAD, capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 1
    assert "no timings are shown" in done.stderr
    assert "|" not in done.stdout
