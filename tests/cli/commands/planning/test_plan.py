"""`translution plan`: the folder and what is printed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from translution.cli.main import run

Captured = pytest.CaptureFixture[str]


def test_without_a_folder_nothing_is_written(tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["plan", "vit-tiny/56", "--cluster", "2xH100", "--data", "synthetic"]
    assert run(words) == 0
    assert "nothing written: --out FOLDER writes a plan folder" in capsys.readouterr().out
    assert run([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["folder"] is None
    assert list(tmp_path.iterdir()) == []
    assert run([*words, "--force"]) == 2
    assert "force: is not allowed: must be used with --out" in capsys.readouterr().err


def test_verbose_and_the_readme_give_every_reason(tmp_path: Path, capsys: Captured) -> None:
    words = ["plan", "vit-tiny/56", "--cluster", "2xH100", "--data", "synthetic", "--out", str(tmp_path / "plan")]
    words += ["--stage", "3"]
    assert run(words) == 0
    short = capsys.readouterr().out
    assert run([*words, "--force", "--verbose"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(short)
    readme = (tmp_path / "plan" / "README.md").read_text(encoding="utf-8")
    for title in (
        "Strategies tried",
        "What a rank sends in a step with this batch",
        "Pareto set: nothing faster",
        "Predicted time of a step",
        "max_live_elements",
    ):
        assert title in out
        assert title in readme
        assert title not in short


def test_names_with_markup_are_printed_literally(tmp_path: Path, root: Path, capsys: Captured) -> None:
    folder = tmp_path / "x[" / "y]"
    arguments = [str(root / "examples" / "digits.yaml"), "--cluster", "cpu:1", "--set", "name='[/bold]'"]
    assert run(["plan", *arguments, "--out", str(folder)]) == 0
    assert "[/bold]" in capsys.readouterr().out
    assert run(["estimate", "vit-tiny/56", "--set", "name='[/x]'"]) == 0
    assert "[/x]" in capsys.readouterr().out


def test_relation_parallelism_is_written_and_named(tmp_path: Path, capsys: Captured) -> None:
    out = tmp_path / "plan"
    words = ["plan", "vit-small/32", "--cluster", "2x4xH100", "--data", "synthetic", "--all-nodes"]
    assert run([*words, "--relation-parallel", "4", "--out", str(out), "--verbose"]) == 0
    printed = capsys.readouterr().out
    assert "with relation parallelism, no offload; 8 ranks in groups of 4 on 2" in " ".join(printed.split())
    assert "ranks that share relations" in printed
    assert json.loads((out / "plan.json").read_text(encoding="utf-8"))["parallel"] == {"relation": 4}
    readme = " ".join((out / "README.md").read_text(encoding="utf-8").split())
    assert "relation parallelism in groups of 4 ranks, which share out the relations, and ZeRO-" in readme
    assert "over 2 replica(s)" in readme
    # Trainer and Accelerate make no groups.
    assert "accelerate" not in readme
    assert not (out / "accelerate.yaml").exists()
    assert run([*words, "--relation-parallel", "3", "--out", str(tmp_path / "other")]) == 2
    captured = capsys.readouterr()
    assert captured.err == (
        "translution: error: relation_parallel: 3 is not allowed: must divide the number of ranks 8\n"
    )
    assert not (tmp_path / "other").exists()
