"""Streams that cannot take what is printed, and Ctrl-C before the command line can answer it."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import pytest

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
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == "translution: error: standard output: cannot be written: No space left on device\n"


def test_ctrl_c_during_the_imports_is_one_line() -> None:
    program = (
        "import sys\nfrom translution.cli import main\n"
        "class Finder:\n"
        "    def find_spec(self, *_):\n"
        "        raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Finder())\nmain()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (130, "translution: error: interrupted\n")


@pytest.mark.parametrize("loaded", [True, False])
def test_what_triton_would_report_at_exit_is_collected(loaded: bool) -> None:
    """Triton 3.9 and newer print what is not collected at exit; without Triton, collecting would only take time."""
    program = (
        "import gc, sys\nfrom translution.cli import main\n"
        "gc.freeze = lambda: print('frozen')\nsys.argv[1:] = ['--version']\n"
    )
    program += "sys.modules['triton'] = gc\nmain()\n" if loaded else "main()\n"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert ("frozen" in done.stdout) == (not loaded)
