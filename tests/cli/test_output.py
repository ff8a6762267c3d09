"""Tables fit their console: words and figures stay whole in 80 columns, and COLUMNS is obeyed."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from translution.cli.main import run
from translution.cli.output import console, fit_columns, make_table

Captured = pytest.CaptureFixture[str]
WIDE = [
    ["operator", "full Translution", "attention, vectors"],
    ["parameters", "15.61 G", "87.52 M"],
    ["train / sample", "6.64 TFLOP", "110 GFLOP"],
]


def printed(width: int, columns: list[str], rows: list[list[str]], text_columns: int = 1) -> list[str]:
    file = io.StringIO()
    Console(width=width, file=file).print(make_table("a title", columns, rows, text_columns=text_columns))
    return file.getvalue().splitlines()


def test_columns_that_fit_keep_their_widths() -> None:
    assert fit_columns(WIDE, 80, [True, True, True]) == ([18, 10, 14], 2)


def test_headings_wrap_before_cells_and_the_gap_shrinks_before_a_figure_leaves_its_unit() -> None:
    assert fit_columns(WIDE, 43, [True, True, True]) == ([18, 10, 11], 2)
    assert fit_columns(WIDE, 40, [True, True, True]) == ([18, 10, 10], 1)


def test_a_word_breaks_only_if_nothing_else_is_left() -> None:
    widths, gap = fit_columns(WIDE, 32, [True, True, True])
    assert sum(widths) + 2 * gap == 32
    assert widths[:2] == [11, 10], "the longest words"
    widths, gap = fit_columns(WIDE, 12, [True, True, True])
    assert sum(widths) + 2 * gap == 12


def test_a_long_path_breaks_before_a_figure_does() -> None:
    rows = [["reduce bucket", "reduce_bucket_size in bf16", "a/b/" + "c" * 60, "508 MiB"]]
    lines = printed(80, ["item", "formula", "source", "size"], rows, text_columns=3)
    assert max(map(len, lines)) <= 80
    assert any(line.startswith("reduce bucket") and line.endswith("508 MiB") for line in lines)


@pytest.mark.parametrize("words", [["estimate", "vit-base/16"], ["clusters"]])
@pytest.mark.parametrize("width", [80, 120])
def test_the_tables_of_a_command_are_as_wide_as_columns_says_and_break_no_word(
    words: list[str], width: int, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "1000")
    assert run(words) == 0
    whole = set(capsys.readouterr().out.split())
    monkeypatch.setenv("COLUMNS", str(width))
    assert run(words) == 0
    out = capsys.readouterr().out
    tables = out.partition("\nSources")[0]
    assert (width > 80) == (max(map(len, tables.splitlines())) > 80)
    assert max(map(len, tables.splitlines())) <= width
    broken = set(out.split()) - whole
    assert {word for word in broken if set(word) != {"─"}} == set()


def test_a_pipe_is_80_columns_wide(monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    assert console().width == 80
