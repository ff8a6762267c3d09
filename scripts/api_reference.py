"""Write docs/api/*.md, the reference of every public name, from the sources alone: nothing is imported.

    python scripts/api_reference.py

Public is what begins with no underscore and is defined where it stands. A module, class, function or property of
that kind without a docstring is an error, and so is a page that has nothing to say.
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import griffe

ROOT = Path(__file__).resolve().parent.parent
PAGES = ROOT / "docs" / "api"
PACKAGES = ("planner", "models", "distributed", "reports", "cli")
WIDTH = 100
_HEAD = "<!-- Made by python scripts/api_reference.py (make docs): change the docstrings instead. -->"


class MissingDocstringError(Exception):
    """Public names that say nothing of themselves."""


def _is_own(member: griffe.Object | griffe.Alias) -> bool:
    return not member.name.startswith("_") and not member.is_alias


def _modules(package: griffe.Module) -> Iterator[griffe.Module]:
    for module in sorted(package.modules.values(), key=lambda module: module.name):
        if not module.name.startswith("_"):
            yield module


def _by_line(members: list[griffe.Object]) -> list[griffe.Object]:
    return sorted(members, key=lambda member: member.lineno or 0)


def _own(scope: griffe.Module | griffe.Class, *kinds: griffe.Kind) -> list[griffe.Object]:
    """Members of some kinds that are defined in a scope, as they stand in the file."""
    found = [member for member in scope.members.values() if _is_own(member) and member.kind in kinds]
    return _by_line([member for member in found if isinstance(member, griffe.Object)])


def _properties(scope: griffe.Class) -> list[griffe.Object]:
    return [member for member in _own(scope, griffe.Kind.ATTRIBUTE) if "property" in member.labels]


def missing(package: griffe.Module) -> list[str]:
    """Public names of a package that have no docstring; fields and constants need none."""
    found = []
    for module in _modules(package):
        classes = _own(module, griffe.Kind.CLASS)
        named = [module, *classes, *_own(module, griffe.Kind.FUNCTION)]
        for member in classes:
            assert isinstance(member, griffe.Class)
            named += _own(member, griffe.Kind.FUNCTION) + _properties(member)
        # A property's setter, and what overrides a documented method, is documented by that.
        found += [member.path for member in named if member.docstring is None and not _overrides(member)]
    return found


def _overrides(member: griffe.Object) -> bool:
    parent = member.parent
    if not isinstance(parent, griffe.Class):
        return False
    return any(member.name in base.members for base in _bases(parent))


def _bases(cls: griffe.Class) -> list[griffe.Class]:
    try:
        return [base for base in cls.mro() if isinstance(base, griffe.Class)]
    except ValueError:
        return []


def _signature(member: griffe.Object) -> str:
    """A function as it is called, or a class as it is made, broken into lines where it is long."""
    assert isinstance(member, griffe.Function | griffe.Class)
    pieces = _pieces(member)
    if isinstance(member, griffe.Class) and not pieces:
        bases = ", ".join(map(str, member.bases))
        return f"class {member.name}({bases})" if bases else f"class {member.name}"
    result = f" -> {member.returns}" if isinstance(member, griffe.Function) and member.returns is not None else ""
    text = f"{member.name}({', '.join(pieces)}){result}"
    if len(text) <= WIDTH:
        return text
    return "\n".join([f"{member.name}(", *(f"    {piece}," for piece in pieces), f"){result}"])


def _pieces(member: griffe.Function | griffe.Class) -> list[str]:
    """The parameters as they are written, with the marks of positional-only and keyword-only ones."""
    pieces: list[str] = []
    star = slash = False
    for parameter in member.parameters:
        if parameter.name in ("self", "cls"):
            continue
        kind = parameter.kind
        if slash and kind is not griffe.ParameterKind.positional_only:
            pieces.append("/")
        slash = kind is griffe.ParameterKind.positional_only
        if kind is griffe.ParameterKind.keyword_only and not star:
            pieces.append("*")
        star = star or kind in (griffe.ParameterKind.keyword_only, griffe.ParameterKind.var_positional)
        marks = {griffe.ParameterKind.var_positional: "*", griffe.ParameterKind.var_keyword: "**"}
        text = marks.get(kind, "") + parameter.name
        text += f": {parameter.annotation}" if parameter.annotation is not None else ""
        if parameter.default is not None and kind not in marks:
            text += f" = {parameter.default}" if parameter.annotation is not None else f"={parameter.default}"
        pieces.append(text)
    return pieces


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _text(text: str) -> str:
    """Paragraphs; one that is laid out in columns keeps its lines."""
    paragraphs = text.split("\n\n")
    columns = [re.search(r"\S {3,}\S", paragraph) is not None for paragraph in paragraphs]
    return "\n\n".join(f"```text\n{p}\n```" if column else p for p, column in zip(paragraphs, columns, strict=True))


def _docstring(member: griffe.Object) -> Iterator[str]:
    """A docstring as Markdown: text as it is, arguments and errors as lists."""
    if member.docstring is None:
        return
    for section in member.docstring.parse("google"):
        match section:
            case griffe.DocstringSectionText():
                yield from (_text(section.value), "")
            case griffe.DocstringSectionParameters():
                yield from (f"- `{item.name}`: {_one_line(item.description)}" for item in section.value)
                yield ""
            case griffe.DocstringSectionReturns():
                yield from (f"Returns: {_one_line(item.description)}" for item in section.value)
                yield ""
            case griffe.DocstringSectionYields():
                yield from (f"Yields: {_one_line(item.description)}" for item in section.value)
                yield ""
            case griffe.DocstringSectionRaises():
                yield from (f"- raises `{item.annotation}`: {_one_line(item.description)}" for item in section.value)
                yield ""
            case griffe.DocstringSectionAdmonition():
                yield from (f"{section.title}:", "", "```python", section.value.description, "```", "")
            case _:
                raise ValueError(f"{member.path}: a section {section.kind.value!r} of a docstring has no form here")


def _fields(cls: griffe.Class) -> Iterator[str]:
    """The fields of a class of data, and its properties: name, type, value unless given, meaning."""
    rows = []
    for member in _own(cls, griffe.Kind.ATTRIBUTE):
        assert isinstance(member, griffe.Attribute)
        if member.annotation is None or (member.docstring is None and "property" in member.labels):
            continue
        value = "" if member.value is None or "property" in member.labels else f" = {member.value}"
        meaning = "" if member.docstring is None else f": {_one_line(member.docstring.value)}"
        rows.append(f"- `{member.name}: {_one_line(f'{member.annotation}{value}')}`{meaning}")
    if rows:
        yield from (*rows, "")


def _entry(member: griffe.Object, level: int) -> Iterator[str]:
    yield from (f"{'#' * level} {member.name}", "", "```python", _signature(member), "```", "")
    yield from _docstring(member)
    if isinstance(member, griffe.Class):
        yield from _fields(member)
        for method in _own(member, griffe.Kind.FUNCTION):
            if method.docstring is not None:
                yield from _entry(method, level + 1)


def _constants(module: griffe.Module) -> Iterator[str]:
    rows = [
        f"- `{member.name}`: {_one_line(member.docstring.value)}"
        for member in _own(module, griffe.Kind.ATTRIBUTE)
        if member.docstring is not None
    ]
    if rows:
        yield from (*rows, "")


def page(package: griffe.Module) -> str:
    """One package's page."""
    lines = [_HEAD, "", f"# translution.{package.name}", ""]
    lines += [package.docstring.value, ""] if package.docstring is not None else []
    for module in _modules(package):
        lines += [f"## translution.{module.path}", ""]
        lines += [*_docstring(module), *_constants(module)]
        for member in _own(module, griffe.Kind.CLASS, griffe.Kind.FUNCTION):
            lines += _entry(member, 3)
    return "\n".join(line.rstrip() for line in "\n".join(lines).splitlines()).rstrip() + "\n"


def pages(root: Path = ROOT) -> dict[str, str]:
    """Every page by its file's name.

    Args:
        root: the folder that holds the packages.

    Raises:
        MissingDocstringError: naming each public name without a docstring.
    """
    # It warns of lines such as "dim, heads: as in X", which mean several parameters.
    logging.getLogger("griffe").setLevel(logging.ERROR)
    result, silent = {}, []
    for name in PACKAGES:
        if not (root / name).is_dir():
            continue
        package = griffe.load(name, search_paths=[str(root)], try_relative_path=False, allow_inspection=False)
        assert isinstance(package, griffe.Module)
        silent += missing(package)
        result[f"{name}.md"] = page(package)
    if silent:
        raise MissingDocstringError(f"no docstring: {', '.join(silent)}")
    return result


def main() -> None:
    """Write all pages."""
    try:
        made = pages()
    except MissingDocstringError as error:
        sys.exit(f"api_reference: error: {error}")
    PAGES.mkdir(parents=True, exist_ok=True)
    for name, text in made.items():
        (PAGES / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
