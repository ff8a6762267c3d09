"""`translution plan`: the folder and what is printed."""

from __future__ import annotations

from pathlib import Path

import pytest

from translution.cli.main import run

Captured = pytest.CaptureFixture[str]


def test_names_with_markup_are_printed_literally(tmp_path: Path, root: Path, capsys: Captured) -> None:
    folder = tmp_path / "x[" / "y]"
    arguments = [str(root / "examples" / "digits.yaml"), "--cluster", "cpu:1", "--set", "name='[/bold]'"]
    assert run(["plan", *arguments, "--out", str(folder)]) == 0
    assert "[/bold]" in capsys.readouterr().out
    assert run(["estimate", "vit-tiny/56", "--set", "name='[/x]'"]) == 0
    assert "[/x]" in capsys.readouterr().out
