"""Pages of the API reference, one a package, from the sources alone; and the public names without a docstring.

    python scripts/api_pages.py    # prints public names without a docstring; exit code 1 if there are any

Public is what begins with no underscore and is defined where it stands. The pages hold directives that mkdocstrings
replaces with signatures and docstrings when the site is built (scripts/site_hooks.py).
"""

from __future__ import annotations

import ast
import logging
import sys
from collections.abc import Iterator
from pathlib import Path

import griffe

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("planner", "models", "distributed", "reports", "cli")


def link_packages(folder: Path) -> None:
    """Make links FOLDER/translution/NAME to the packages: griffe finds them there under their installed names."""
    links = folder / "translution"
    links.mkdir(parents=True, exist_ok=True)
    for name in PACKAGES:
        link = links / name
        if not link.is_symlink():
            link.symlink_to(ROOT / name, target_is_directory=True)


def _folders(package: str) -> list[str]:
    """Return a package and its sub-packages as paths from the root, parents first."""
    inits = (path.parent for path in (ROOT / package).rglob("__init__.py"))
    return sorted(folder.relative_to(ROOT).as_posix() for folder in inits)


def _page_path(folder: str) -> str:
    return f"docs/api/{folder}.md"


def pages() -> dict[str, str]:
    """Return the reference's pages: Markdown by path from the root."""
    result = {}
    for package in PACKAGES:
        folders = _folders(package)
        for folder in folders:
            result[_page_path(folder)] = _page(
                folder, [other for other in folders if Path(other).parent == Path(folder)]
            )
    return result


def _page(folder: str, below: list[str]) -> str:
    """Return one package's page: its docstring, links to the packages below it, and its modules."""
    name = "translution." + folder.replace("/", ".")
    # Written pages come first in the results of a search.
    lines = [
        "---",
        "search: {boost: 0.2}",
        "---",
        f"# {name}",
        "",
        f"::: {name}",
        "    options: {show_root_heading: false, show_root_toc_entry: false}",
        "",
    ]
    lines += [f"- [{Path(other).name}]({Path(folder).name}/{Path(other).name}.md)" for other in below]
    exported = [f"[`{symbol}`][{path}]" for symbol, path in _exports(folder)]
    lines += ["", *(["Public names: " + ", ".join(exported) + "."] if exported else []), ""]
    for path in sorted((ROOT / folder).glob("*.py")):
        if not path.name.startswith("_"):
            lines += [f"::: {name}.{path.stem}", ""]
    return "\n".join(lines)


def _exports(folder: str) -> list[tuple[str, str]]:
    """Return the names that a package exports from its modules, each with its path, from ``__init__``'s imports."""
    stub = ROOT / folder / "__init__.pyi"
    source = stub if stub.exists() else stub.with_suffix(".py")
    package = "translution." + folder.replace("/", ".")
    return [
        (alias.name, f"{package}.{node.module}.{alias.name}")
        for node in ast.parse(source.read_text(encoding="utf-8")).body
        if isinstance(node, ast.ImportFrom) and node.level == 1 and node.module is not None
        for alias in node.names
    ]


def navigation() -> list[object]:
    """Return the reference's part of the navigation: each package with its sub-packages below it."""
    result: list[object] = []
    for package in PACKAGES:
        entries = [{folder.replace("/", "."): _page_path(folder)} for folder in _folders(package)]
        result.append({package: entries} if len(entries) > 1 else entries[0])
    return result


def _is_own(member: griffe.Object | griffe.Alias) -> bool:
    return not member.name.startswith("_") and not member.is_alias


def _own(scope: griffe.Module | griffe.Class, *kinds: griffe.Kind) -> list[griffe.Object]:
    """Return the public members of some kinds that are defined in a scope."""
    found = [member for member in scope.members.values() if _is_own(member) and member.kind in kinds]
    return [member for member in found if isinstance(member, griffe.Object)]


def _properties(scope: griffe.Class) -> list[griffe.Object]:
    return [member for member in _own(scope, griffe.Kind.ATTRIBUTE) if "property" in member.labels]


def _modules(package: griffe.Module) -> Iterator[griffe.Module]:
    """Yield a package and every public module in it."""
    yield package
    for module in sorted(package.modules.values(), key=lambda module: module.name):
        if not module.name.startswith("_"):
            yield from _modules(module)


def _overrides(member: griffe.Object) -> bool:
    """Return whether a base class of the project documents this method or property."""
    parent = member.parent
    if not isinstance(parent, griffe.Class):
        return False
    try:
        bases = [base for base in parent.mro() if isinstance(base, griffe.Class)]
    except ValueError:
        return False
    return any(member.name in base.members for base in bases)


def undocumented(root: Path = ROOT) -> list[str]:
    """Return the public modules, classes, functions, methods and properties without a docstring.

    Fields and constants need none, nor does a method whose base class documents it.

    Args:
        root: the folder that holds the packages.
    """
    logging.getLogger("griffe").setLevel(logging.ERROR)
    found = []
    for name in PACKAGES:
        if not (root / name).is_dir():
            continue
        package = griffe.load(name, search_paths=[str(root)], try_relative_path=False, allow_inspection=False)
        assert isinstance(package, griffe.Module)
        for module in _modules(package):
            classes = _own(module, griffe.Kind.CLASS)
            named = [module, *classes, *_own(module, griffe.Kind.FUNCTION)]
            for member in classes:
                assert isinstance(member, griffe.Class)
                named += _own(member, griffe.Kind.FUNCTION) + _properties(member)
            found += [member.path for member in named if member.docstring is None and not _overrides(member)]
    return found


if __name__ == "__main__":
    names = undocumented()
    print(*names, sep="\n")
    sys.exit(bool(names))
