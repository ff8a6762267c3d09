"""Progress on stderr: nothing for two seconds, then lines with what is left; on a terminal a bar."""

from __future__ import annotations

import io
import sys

import pytest

from translution.cli.progress import WorkProgress

Captured = pytest.CaptureFixture[str]


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_lines_come_after_two_seconds_and_tell_what_is_left(capsys: Captured) -> None:
    clock = Clock()
    with WorkProgress("training", "models", clock) as progress:
        for done in range(1, 41):
            clock.now += 1
            progress.show(done, 40)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == [
        "training: 2 of 40 models, 2 s so far, about 38 s left",
        "training: 12 of 40 models, 12 s so far, about 28 s left",
        "training: 22 of 40 models, 22 s so far, about 18 s left",
        "training: 32 of 40 models, 32 s so far, about 8 s left",
    ]


def test_what_ends_within_two_seconds_shows_nothing(capsys: Captured) -> None:
    clock = Clock()
    with WorkProgress("searching", clock=clock) as progress:
        for done in range(10):
            clock.now += 0.15
            progress.show(done, 10)
    assert capsys.readouterr().err == ""


def test_parts_that_are_done_add_up(capsys: Captured) -> None:
    clock = Clock()
    with WorkProgress("verifying", clock=clock) as progress:
        for _ in range(3):
            clock.now += 4
            progress.advance(100, 400)
    assert capsys.readouterr().err.splitlines() == ["verifying: 25%, 4 s so far, about 12 s left"]


def test_before_the_first_part_is_done_nothing_is_foretold(capsys: Captured) -> None:
    clock = Clock()
    with WorkProgress("calibrating", clock=clock) as progress:
        clock.now += 130
        progress.show(0, 7, "starting")
        clock.now += 500
        progress.show(1, 7, "matrix products")
    assert capsys.readouterr().err.splitlines() == [
        "calibrating: 0%, starting, 2 min so far",
        "calibrating: 14%, matrix products, 10 min so far, about 63 min left",
    ]


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal, clock = Terminal(), Clock()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr(sys, "stderr", terminal)
    with WorkProgress("comparing", clock=clock) as progress:
        clock.now += 10
        progress.show(1, 4)
    shown = terminal.getvalue()
    assert "comparing" in shown
    assert "25%" in shown
    assert "about 30 s left" in shown
