"""What the README shows works as it stands there."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import tokenizers
import typer

from translution.cli.app import app, run


@pytest.fixture
def readme(root: Path) -> str:
    return (root / "README.md").read_text(encoding="utf-8")


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def test_the_python_examples_run(readme: str, root: Path) -> None:
    planning = blocks((root / "docs" / "planning.md").read_text(encoding="utf-8"), "python")
    examples = blocks(readme, "python") + planning
    assert len(examples) >= 2
    for example in examples:
        exec(compile(example, "README.md", "exec"), {})


def test_the_planning_commands_work(
    readme: str, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every estimate, plan and report of the README; what runs ranks is run in other tests."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(root / "examples")
    commands = [shlex.split(line) for block in blocks(readme, "sh") for line in block.splitlines()]
    known = {"estimate", "plan", "launch", "verify", "measure", "rehearse", "report", "compare"}
    assert {command[1] for command in commands} == known
    for command in commands:
        assert command[0] == "translution"
        if command[1] in ("estimate", "plan", "report", "compare"):
            assert run(command[1:]) == 0, capsys.readouterr().err
        elif command[1] == "measure":
            assert (tmp_path / command[2]).exists()
        else:
            assert (tmp_path / command[2] / "plan.json").exists()


def test_the_commands_of_the_page_on_data_work(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(root / "examples")
    for name in ("book.txt", "more.txt"):
        (tmp_path / name).write_text("a line of a book\n" * 200)
    tokenizer = tokenizers.ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(["a line of a book"], show_progress=False)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    page = (root / "docs" / "data.md").read_text(encoding="utf-8").replace("\\\n", "")
    commands = [shlex.split(line) for line in page.splitlines() if line.startswith("    translution ")]
    assert {command[1] for command in commands} == {"plan", "launch", "prepare"}
    for command in commands:
        if command[1] == "launch":
            assert (tmp_path / command[2] / "plan.json").exists()
        else:
            assert run(command[1:]) == 0, capsys.readouterr().err


def commands_of(page: Path) -> list[list[str]]:
    """What a page has its reader type, without what a shell does to it."""
    text = page.read_text(encoding="utf-8").replace("\\\n", "")
    return [shlex.split(line) for line in text.splitlines() if re.match(r"( {4})?translution [a-z]", line)]


def test_every_command_of_the_pages_is_one_that_the_program_takes(root: Path) -> None:
    program = typer.main.get_command(app)
    pages = [root / "README.md", *sorted((root / "docs").glob("*.md"))]
    taken = set()
    for page in pages:
        for _, name, *arguments in commands_of(page):
            command = program.get_command(None, name)
            assert command is not None, (page, name)
            command.make_context(name, [*arguments])  # Reads every option; runs nothing.
            taken.add(name)
    shown = {name for name, command in program.commands.items() if not command.hidden}
    assert taken == shown, "each command has its place in a page"


def test_the_costs_shown_are_the_planners(readme: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["estimate", "vit-base/16"]) == 0
    printed = capsys.readouterr().out
    rows = [line for line in readme.splitlines() if re.match(r"(full Translution|α-Translution|attention) ", line)]
    assert len(rows) == 3
    for row in rows:
        for cell in re.split(r" {2,}", row):
            assert cell in printed


def test_the_benchmark_shown_is_the_committed_one(readme: str, root: Path) -> None:
    results = root / "benchmarks" / "results"
    document = json.loads((results / "operator.json").read_text())
    row = next(row for row in document["results"] if row["case"] == "ViT-A/56")
    shown = next(line for line in readme.splitlines() if line.startswith("| ViT-A/56"))
    assert f"{row['grouped_seconds']:.3f} s" in shown
    assert f"{row['times_faster']:.0f}×" in shown
    assert f"{row['times_smaller']:.0f}×" in shown
    assert shown in (results / "operator.md").read_text()
    shares = [round(other["matmul_rate_share"] * 100) for other in document["results"] if other is not row]
    assert f"at {min(shares)} to {max(shares)}% of the rate" in readme
    assert f"takes {document['alpha']['time_ratio']:.0f} times as long as attention" in readme
    assert f"tables alone make it {document['alpha']['operations_ratio']:.0f} times the operations" in readme
    assert row["times_faster"] >= 20
    assert row["times_smaller"] >= 20
    assert document["parity"] <= 1e-10
