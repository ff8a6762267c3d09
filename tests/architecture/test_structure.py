"""Sizes, names and places of the project's modules and tests."""

from __future__ import annotations

import ast
import tomllib
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

TOP_FOLDERS = ("planner", "models", "distributed", "reports", "cli")
CHECKED_FOLDERS = (*TOP_FOLDERS, "tests", "benchmarks", "scripts")
MODULES_PER_FOLDER = 12
LINES_PER_MODULE = 400
LINES_PER_FUNCTION = 60
"""Without signature and docstring."""
TESTS_WITHOUT_A_MODULE = {"architecture", "benchmarks", "browser", "docs", "helpers", "integration", "programs"}
"""Folders in tests/ that test no single package."""


def modules_in(root: Path, *folders: str) -> Iterator[Path]:
    for folder in folders:
        yield from sorted((root / folder).rglob("*.py"))


def packages_in(root: Path, *folders: str) -> Iterator[Path]:
    for folder in folders:
        yield from (path.parent for path in sorted((root / folder).rglob("__init__.py")))


def public_names(tree: ast.Module) -> Iterator[str]:
    """Top-level functions, classes and variables of a module, private ones left out."""
    for node in tree.body:
        names: list[str] = []
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names = [node.name]
        elif isinstance(node, ast.Assign):
            names = [name.id for target in node.targets for name in ast.walk(target) if isinstance(name, ast.Name)]
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names = [node.target.id]
        yield from (name for name in names if not name.startswith("_"))


@pytest.mark.parametrize("folder", CHECKED_FOLDERS)
def test_no_folder_has_more_modules_than_a_reader_can_scan(folder: str, root: Path) -> None:
    modules: dict[str, list[str]] = defaultdict(list)
    for path in modules_in(root, folder):
        if path.name != "__init__.py":
            modules[path.parent.relative_to(root).as_posix()].append(path.name)
    large = {name: len(files) for name, files in modules.items() if len(files) > MODULES_PER_FOLDER}
    assert not large, large


@pytest.mark.parametrize("folder", CHECKED_FOLDERS)
def test_modules_and_functions_are_short(folder: str, root: Path) -> None:
    long = []
    for path in modules_in(root, folder):
        text = path.read_text(encoding="utf-8")
        name = path.relative_to(root).as_posix()
        if (lines := len(text.splitlines())) >= LINES_PER_MODULE:
            long.append(f"{name}: {lines} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno is not None:
                # The signature and the docstring are its interface: a command's holds all options and their help texts.
                first = node.body[1] if ast.get_docstring(node) and len(node.body) > 1 else node.body[0]
                lines = node.end_lineno - first.lineno + 1
                if lines >= LINES_PER_FUNCTION:
                    long.append(f"{name}: {node.name} has {lines} lines of statements")
    assert long == []


def test_no_public_name_is_defined_twice(root: Path) -> None:
    places = defaultdict(list)
    for path in modules_in(root, *TOP_FOLDERS):
        for name in public_names(ast.parse(path.read_text(encoding="utf-8"))):
            places[name].append(path.relative_to(root).as_posix())
    assert len(places) > 500
    assert {name: files for name, files in places.items() if len(files) > 1} == {}


def test_every_test_is_where_its_module_is(root: Path) -> None:
    """`tests/planner/costs/test_flops.py` or `test_flops_<aspect>.py` tests `planner/costs/workload.py`."""
    lost = []
    for path in modules_in(root, "tests"):
        place = path.relative_to(root / "tests")
        if not path.name.startswith("test_") or place.parts[0] in TESTS_WITHOUT_A_MODULE:
            continue
        stem = path.stem.removeprefix("test_")
        siblings = (root / place.parent).glob("*")
        modules = {
            sibling.stem
            for sibling in siblings
            if sibling.suffix in (".py", ".sh") or (sibling / "__init__.py").exists()
        }
        if not any(stem == module or stem.startswith(f"{module}_") for module in modules):
            lost.append(place.as_posix())
    assert lost == []


def test_tests_that_mirror_nothing_are_in_known_folders(root: Path) -> None:
    known = {*TOP_FOLDERS, *TESTS_WITHOUT_A_MODULE, "data", "scripts"}
    assert {path.name for path in (root / "tests").iterdir() if path.is_dir() and path.name != "__pycache__"} <= known


def test_every_package_is_installed(root: Path) -> None:
    configuration = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
    listed = configuration["tool"]["setuptools"]["packages"]
    # The namespace itself has one module, the __main__ of python -m translution.
    found = ["translution"] + [
        "translution." + ".".join(path.relative_to(root).parts) for path in packages_in(root, *TOP_FOLDERS)
    ]
    assert sorted(listed) == sorted(found)


@pytest.mark.parametrize("folder", TOP_FOLDERS)
def test_every_package_says_what_it_is_for(folder: str, root: Path) -> None:
    for path in packages_in(root, folder):
        docstring = ast.get_docstring(ast.parse((path / "__init__.py").read_text(encoding="utf-8")))
        assert docstring is not None, path
        assert len(docstring) > 20, path
    for module in modules_in(root, folder):
        assert (module.parent / "__init__.py").exists(), f"{module.parent} is no package"
