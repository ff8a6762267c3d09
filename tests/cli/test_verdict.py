"""The verdict of `plan`: the figures that one decides by, within 15 lines of 80 columns."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from translution.cli.main import run
from translution.cli.verdict import MOST_LINES

Captured = pytest.CaptureFixture[str]
BASE = ["plan", "vit-base/16", "--cluster", "8xH100", "--precision", "bf16", "--data", "synthetic"]
PLANS = {
    "one node": BASE,
    "hybrid offload": [*BASE[:1], "vit-large/16", *BASE[2:]],
    "nvme": ["plan", "vit-large/16", "--cluster", "2xRTX4090", *BASE[4:], "--nvme-path", "/nvme"],
    "least memory": [*BASE, "--minimize", "memory", "--micro-batch", "2"],
    "one strategy": [*BASE, "--stage", "3", "--offload", "none"],
    "two nodes": [*BASE[:3], "2x8xH100", *BASE[4:]],
    "this machine": ["plan", "vit-tiny/56", "--cluster", "cpu:1", "--data", "synthetic"],
}


@pytest.fixture(autouse=True)
def _narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")


@pytest.mark.parametrize("name", PLANS)
def test_a_verdict_has_every_figure_in_15_lines_of_80_columns(name: str, capsys: Captured) -> None:
    assert run(PLANS[name]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= MOST_LINES == 15
    assert max(map(len, lines)) <= 80
    assert ": fits" in lines[0]
    labels = [line[:11].strip() for line in lines[1:-1] if line[:11].strip()]
    rest = ["step", "run", "fastest" if name == "least memory" else "next best"]
    memory = ["memory"] if name == "this machine" else ["device", "host"]
    assert labels == ["model", "strategy", "batch", *memory, *(["NVMe"] if name == "nvme" else []), *rest]
    text = "\n".join(lines)
    for part in (" a rank of ", "samples a step", " s (", "samples/s (", "-hours", "nothing written"):
        assert part in text


def test_the_folder_and_the_next_command_end_the_verdict(tmp_path: Path, capsys: Captured) -> None:
    folder = tmp_path / "my plan"
    assert run([*PLANS["two nodes"], "--out", str(folder)]) == 0
    *above, last = capsys.readouterr().out.splitlines()
    assert len(above) + 1 <= MOST_LINES
    command = last.partition("run it: ")[2]
    assert shlex.split(command) == ["translution", "launch", str(folder), "--hostfile", f"{folder}/hostfile"]


@pytest.mark.slow
def test_what_does_not_fit_is_said_first_with_what_would(tmp_path: Path, capsys: Captured) -> None:
    words = [*BASE[:1], "vit-large/16", *BASE[2:], "--stage", "3", "--offload", "none"]
    assert run([*words, "--out", str(tmp_path / "plan")]) == 3
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert len(lines) <= MOST_LINES
    assert lines[:2] == ["vit-large/16 on 1x8xH100: does not fit", "Any one of these changes makes a plan fit:"]
    assert [line.split()[0] for line in lines[2:5]] == ["nodes", "input", "width"]
    assert lines[-1].endswith("what was tried: --verbose")
    assert captured.err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["plan-hybrids"]
