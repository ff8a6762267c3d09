"""Completion in bash, zsh and fish: commands, options, and names of presets, clusters and choices."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from translution.cli.completion import complete_cluster, complete_data, complete_gpu, complete_model
from translution.cli.main import run

Captured = pytest.CaptureFixture[str]
SHELLS = ("bash", "zsh", "fish")


def complete(line: str, shell: str, monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> str:
    """Return what `translution` prints to a shell that asks to complete the last word of a line."""
    monkeypatch.setenv("_TRANSLUTION_COMPLETE", f"complete_{shell}")
    if shell == "bash":
        monkeypatch.setenv("COMP_WORDS", line)
        monkeypatch.setenv("COMP_CWORD", str(len(line.split(" ")) - 1))
    else:
        monkeypatch.setenv("_TYPER_COMPLETE_ARGS", line)
        monkeypatch.setenv("_TYPER_COMPLETE_FISH_ACTION", "get-args")
    with pytest.raises(SystemExit):
        run([])
    return capsys.readouterr().out


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("translution estimate vit-b", "vit-base/16"),
        ("translution pl", "plan"),
        ("translution plan vit-base/16 --cluster 2x8xH2", "2x8xH200"),
        ("translution plan vit-base/16 --minimize n", "nodes"),
        ("translution compare gpt-l", "gpt-large/1024"),
        ("translution compare vit-base/16 --gpu RTX", "RTX4090"),
        ("translution experiment la", "language"),
        ("translution launch --hos", "--hostfile"),
    ],
)
def test_a_shell_gets_the_words_that_may_follow(
    shell: str, line: str, expected: str, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    assert expected in complete(line, shell, monkeypatch, capsys)


def test_hidden_commands_are_not_offered(monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    offered = complete("translution pre", "bash", monkeypatch, capsys).split()
    assert offered == ["prepare", "preflight"]


@pytest.mark.parametrize("shell", SHELLS)
def test_the_script_of_a_shell_calls_the_command(shell: str, monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    monkeypatch.setenv("_TRANSLUTION_COMPLETE", f"source_{shell}")
    with pytest.raises(SystemExit):
        run([])
    script = capsys.readouterr().out
    assert f"_TRANSLUTION_COMPLETE=complete_{shell}" in script
    program = shutil.which(shell)
    if program:
        subprocess.run([program, "-n", "/dev/stdin"], input=script, text=True, check=True)


def test_bash_completes_a_preset_with_the_installed_script(tmp_path: Path) -> None:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    variables = {name: value for name, value in os.environ.items() if not name.startswith("_T")} | {"PATH": path}
    program = """
        eval "$(_TRANSLUTION_COMPLETE=source_bash translution)"
        COMP_WORDS=(translution estimate vit-la) COMP_CWORD=2
        _translution_completion translution
        printf '%s\\n' "${COMPREPLY[@]}"
    """
    done = subprocess.run(["bash", "-c", program], env=variables, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["vit-large/56", "vit-large/32", "vit-large/16"]


def test_files_and_folders_are_offered_for_models_and_clusters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "specs").mkdir()
    for name in ("small.yaml", "small.txt", ".hidden.yaml", "specs/one.json"):
        (tmp_path / name).write_text("{}")
    assert complete_model("s") == ["small.yaml", "specs/"]
    assert complete_cluster("specs/") == ["specs/one.json"]
    assert complete_model("missing/x") == []
    assert "cpu:1" in complete_cluster("cpu")
    assert complete_cluster("4xrtx") == ["4xRTX4090", "4xrtx4090-tower"]
    assert complete_gpu("h20") == ["H200"]
    assert complete_data("tok") == ["tokens"]
