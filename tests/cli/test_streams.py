"""Streams that cannot take what is printed, and Ctrl-C before the command line can answer it."""

from __future__ import annotations

import builtins
import io
import subprocess
import sys
from typing import Any

import pytest

from translution import cli
from translution.cli.main import run


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_an_encoding_that_lacks_characters_shows_question_marks(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    out, errors = (io.TextIOWrapper(io.BytesIO(), encoding=encoding) for _ in range(2))
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", errors)
    assert run(["clusters"]) == 0
    assert run(["estimate", "vit-base/16", "--set", "name=Translution λ", "--operator", "alpha"]) == 0
    assert run(["estimate", "λ"]) == 2
    errors.flush()
    assert errors.buffer.getvalue().startswith(b"translution: error: model: '?' is not allowed")  # type: ignore[attr-defined]
    assert b"Translution ?" in out.buffer.getvalue()  # type: ignore[attr-defined]


def test_a_full_disk_is_one_line() -> None:
    command = [sys.executable, "-m", "translution.cli", "estimate", "vit-tiny/56"]
    with open("/dev/full", "w", encoding="utf-8") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == "translution: error: standard output: cannot be written: No space left on device\n"


def test_ctrl_c_during_the_imports_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*words: Any, **more: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.gc, "disable", lambda: None)
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(builtins, "__import__", interrupted)
        cli.main()
    assert ended.value.code == 130
    assert capsys.readouterr().err == "translution: error: interrupted\n"
