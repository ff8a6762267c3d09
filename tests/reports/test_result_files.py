"""Files that reports and comparisons write: none is replaced unless asked for, and all are checked first."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.runs import write_plan

from translution.cli.main import run

Captured = pytest.CaptureFixture[str]


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refused(words: list[str], folder: Path, capsys: Captured) -> str:
    """Run a command that must write nothing; return its error."""
    before = tree(folder)
    assert run(words) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert captured.out == ""
    assert tree(folder) == before
    return captured.err


@pytest.mark.ranks
def test_a_report_replaces_its_own_files_with_force_and_never_a_picture_of_somebody_else(
    tmp_path: Path, capsys: Captured
) -> None:
    plan = write_plan(tmp_path / "plan", 1, data="synthetic")
    names = {"--out": "a.html", "--svg": "a.svg", "--markdown": "a.md", "--data": "a.json"}
    words = ["report", str(plan), *(word for key, name in names.items() for word in (key, str(tmp_path / name)))]
    for name in names.values():
        (tmp_path / name).write_text("mine")
        assert f"{name} exists already" in refused(words, tmp_path, capsys)
        (tmp_path / name).unlink()
    (tmp_path / "a.html").write_text("mine")
    assert run([*words, "--force"]) == 0
    assert "<html" in (tmp_path / "a.html").read_text()
    assert run([*words, "--force"]) == 0  # The pictures are now those of the Markdown.

    capsys.readouterr()
    pictures = [path.name for path in tmp_path.glob("*.svg") if path.name != "a.svg"]
    assert pictures
    for path in tmp_path.glob("a.*"):
        path.unlink()
    (tmp_path / "a.md").write_text("a page without pictures")
    assert f"its picture {tmp_path / pictures[0]} exists already" in refused([*words, "--force"], tmp_path, capsys)
    (tmp_path / "a.md").unlink()
    for name in pictures[1:]:
        (tmp_path / name).unlink()
    assert "exists already" in refused(words, tmp_path, capsys)
    (tmp_path / pictures[0]).unlink()
    words[words.index("--svg") + 1] = str(tmp_path / pictures[0])
    assert "choose another file for --svg" in refused(words, tmp_path, capsys)


def test_a_comparison_checks_all_files_before_it_computes(
    tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("translution.planner.compare", lambda *_, **__: pytest.fail("computed first"))
    (tmp_path / "b.csv").write_text("mine")
    first = ["compare", "vit-tiny/56", "--out", str(tmp_path / "a.md"), "--out"]
    assert "b.csv exists already" in refused([*first, str(tmp_path / "b.csv")], tmp_path, capsys)
    assert "must end in" in refused([*first, str(tmp_path / "b.txt")], tmp_path, capsys)
    assert "is not allowed twice" in refused([*first, str(tmp_path / "a.md")], tmp_path, capsys)
    assert "must be a folder" in refused([*first, str(tmp_path / "none" / "b.md")], tmp_path, capsys)
    two = ["compare", "vit-tiny/56", "vit-tiny/32", "--out", str(tmp_path / "a.png")]
    assert "a picture shows one model, not 2" in refused(two, tmp_path, capsys)


def test_a_comparison_replaces_a_file_with_force(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("mine")
    words = ["compare", "vit-tiny/56", "--alpha-rank", "4", "--out", str(tmp_path / "a.csv")]
    assert run([*words, "--force"]) == 0
    assert (tmp_path / "a.csv").read_text().startswith("model,")
