"""Reading YAML within bounds, and writing files that nobody can redirect."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from translution.planner.common import files
from translution.planner.common.errors import InputError
from translution.planner.common.files import MOST_JSON_LEVELS, read_json, read_mapping, read_yaml, write_text


def aliases(levels: int) -> str:
    """A text whose last value stands for ten to the power of `levels` values."""
    lines = ["a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    for level in range(1, levels):
        lines.append(f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 10)}]")
    return "\n".join(lines)


def test_aliases_that_stand_for_billions_of_values_are_refused_at_once() -> None:
    text = aliases(9)
    assert len(text) < 700
    with pytest.raises(InputError, match=r"spec: more than 100,000 values are not allowed; with aliases it has 1,2"):
        read_yaml(text, "spec")
    assert len(read_yaml(aliases(3), "spec")) == 3


@pytest.mark.parametrize("text", ["a: &a [*a]", "[" * 3000, "&a {b: *a}"])
def test_values_that_contain_themselves_or_nest_too_deeply_are_refused(text: str) -> None:
    with pytest.raises(InputError, match=r"^spec: not valid YAML: "):
        read_yaml(text, "spec")


@pytest.mark.parametrize(("text", "value"), [("", None), ("3", 3), ("a: [1, {b: x}]", {"a": [1, {"b": "x"}]})])
def test_ordinary_values_are_read(text: str, value: object) -> None:
    assert read_yaml(text, "spec") == value


@pytest.mark.parametrize("levels", [MOST_JSON_LEVELS + 1, 900, 100_000])
@pytest.mark.parametrize(("opening", "closing"), [("[", "]"), ('{"a": ', "}")], ids=["list", "object"])
def test_deeply_nested_json_is_one_line(levels: int, opening: str, closing: str, tmp_path: Path) -> None:
    text = levels * opening + "1" + levels * closing
    (tmp_path / "spec.json").write_text(text)
    for read in (lambda: read_json(text, "spec"), lambda: read_mapping(tmp_path / "spec.json")):
        with pytest.raises(InputError, match=r"^[^\n]*: not valid JSON: nested too deeply[^\n]*$"):
            read()
    allowed = MOST_JSON_LEVELS * opening + "1" + MOST_JSON_LEVELS * closing
    assert read_json(allowed.encode(), "spec")


def test_a_link_under_a_temporary_name_is_not_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "victim"
    target.write_text("precious")
    monkeypatch.setattr(files.secrets, "token_hex", lambda count: "00")
    (tmp_path / ".out.00.tmp").symlink_to(target)
    with pytest.raises(InputError, match="out: cannot be written: File exists"):
        write_text(tmp_path / "out", "text")
    assert target.read_text() == "precious"
    monkeypatch.undo()
    write_text(tmp_path / "out", "text", durable=True)
    assert (tmp_path / "out").read_text() == "text"
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o666 & ~current_umask()


def current_umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask


@pytest.mark.parametrize(
    ("name", "text", "first", "second"),
    [
        ("spec.yaml", "dim: 8\nheads: 2\ndim: 16\n", 1, 3),
        ("spec.yaml", "a: 1\nb: {dim: 8,\n dim: 16}\n", 2, 3),
        ("spec.yaml", "b: 1\na:\n - dim: 8\n   'dim': 16\n", 3, 4),
        ("spec.json", '{"dim": 8,\n "b": "dim",\n "dim": 16}', 1, 3),
        ("spec.json", '[{"dim": 8}, {"c": "{", "dim": 8,\n\n "d\\u0069m": 16}]', 1, 3),
    ],
)
def test_a_repeated_key_is_an_error_with_its_lines(
    name: str, text: str, first: int, second: int, tmp_path: Path
) -> None:
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(InputError) as caught:
        read_mapping(path)
    assert str(caught.value) == (
        f"{path}: key 'dim' is not allowed twice: it is on line {first} and again on line {second}"
    )


def test_a_key_may_stand_in_several_mappings() -> None:
    value = {"a": {"dim": 1}, "b": {"dim": 2}, "dim": 3, "1": 4}
    assert read_yaml("a: &a {dim: 1}\nb:\n  <<: *a\n  dim: 2\ndim: 3\n'1': 4\n1: 5", "spec") == value | {1: 5}
    assert read_json('{"a": {"dim": 1}, "b": {"dim": 2}, "dim": 3, "1": 4}', "spec") == value
    assert read_json('{"a": {"dim": 1}, "b": {"dim": 2}, "dim": 3, "1": 4}'.encode("utf-16"), "spec") == value
    with pytest.raises(InputError, match="key 'é' is not allowed twice: it is on line 1 and again on line 2"):
        read_json('{"é": 1,\n"é": 2}'.encode("utf-16"), "spec")
