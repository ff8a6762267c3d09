"""The planner loads no heavy package, and imports between folders and packages go one way."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

LINT_IMPORTS = Path(sys.executable).with_name("lint-imports")
HEAVY = (
    "torch",
    "pandas",
    "deepspeed",
    "fairscale",
    "numpy",
    "sklearn",
    "kornia",
    "altair",
    "vl_convert",
    "starlette",
    "uvicorn",
)

ALLOWED = {
    "planner": set(),
    "models": {"planner"},
    "distributed": {"planner", "models"},
    "reports": {"planner", "distributed"},
    "cli": {"planner", "models", "distributed", "reports"},
}


def loaded_by(program: str) -> list[str]:
    """Return the heavy packages that a fresh interpreter has loaded after a program."""
    check = f"{program}\nimport sys\nprint('loaded:', *[name for name in {HEAVY} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    return result.stdout.rsplit("loaded:", 1)[1].split()


def test_the_check_itself_sees_a_heavy_package() -> None:
    assert "numpy" in loaded_by("import numpy")


def test_importing_the_public_face_loads_no_heavy_package() -> None:
    assert loaded_by("import translution.planner") == []
    assert loaded_by("from translution.planner import *") == []


def test_no_module_of_the_planner_loads_a_heavy_package(root: Path) -> None:
    modules = [
        "translution." + ".".join(path.relative_to(root).with_suffix("").parts)
        for path in (root / "planner").rglob("*.py")
        if path.stem != "__init__"
    ]
    assert len(modules) > 10
    assert loaded_by("\n".join(f"import {module}" for module in modules)) == []


@pytest.mark.parametrize(
    "arguments",
    [
        ["estimate", "vit-base/16"],
        ["estimate", "gpt-base/160", "--json"],
        ["--help"],
        ["launch", "--help"],
        ["rehearse", "--help"],
        ["clusters"],
        ["report", "--help"],
        ["serve", "--help"],
    ],
    ids=" ".join,
)
def test_a_planning_command_loads_no_heavy_package(arguments: list[str]) -> None:
    assert loaded_by(f"from translution.cli.main import run\nassert run({arguments!r}) == 0") == []


@pytest.mark.parametrize("folder", sorted(ALLOWED))
def test_imports_go_one_way(folder: str, root: Path) -> None:
    for path in (root / folder).glob("**/*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                depth = len(path.relative_to(root).parts) - 1
                assert node.level <= depth, f"{path}: relative import beyond {folder}"
                names = [node.module or ""] if node.level == 0 else []
            for name in names:
                if name.startswith("translution."):
                    other = name.split(".")[1]
                    assert other in ALLOWED[folder] | {folder}, f"{path} imports {name}"
                    assert other != folder, f"{path}: {name} should be a relative import"


def test_packages_import_downward(root: Path, tmp_path: Path) -> None:
    """The contracts in pyproject.toml hold; each lists all packages of its folder."""
    command = [LINT_IMPORTS, "--no-logo", "--cache-dir", tmp_path]
    result = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


def test_planning_and_comparing_import_no_torch(root: Path, tmp_path: Path) -> None:
    """Without torch, pandas and DeepSpeed a command answers in a second or two."""
    plan = ["plan", "vit-tiny/56", "--cluster", "8xH100", "--data", "synthetic", "--out", str(tmp_path / "plan")]
    code = (
        "import sys\n"
        "from translution.cli.main import run\n"
        f"assert run({plan!r}) == 0\n"
        "assert run(['compare', 'vit-tiny/56', '--alpha-rank', '4']) == 0\n"
        "assert not {'torch', 'pandas', 'deepspeed', 'numpy'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, cwd=root)
