"""The wheel and the sdist of a release: complete, and enough on their own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path
from typing import Any

import pytest

FOLDERS = ("planner", "models", "distributed", "reports", "cli")


def run(*words: object, **options: Any) -> str:
    done = subprocess.run([*map(str, words)], capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Build an sdist of a copy of the tracked files, and a wheel of the sdist."""
    root = Path(__file__).resolve().parents[2]
    copy, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    listed = run("git", "ls-files", "--cached", "--others", "--exclude-standard", cwd=root).splitlines()
    for name in listed:
        # The gallery is not part of the packages, and large.
        if (root / name).is_file() and not name.startswith("reports/gallery/"):
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root / name, copy / name)
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, copy)
    (sdist,), (wheel,) = out.glob("*.tar.gz"), out.glob("*.whl")
    return {"root": root, "sdist": sdist, "wheel": wheel}


def test_the_wheel_has_every_module_and_data_file_and_nothing_else(built: dict[str, Path]) -> None:
    root = built["root"]
    tracked = run("git", "ls-files", *FOLDERS, cwd=root).splitlines()
    kept = (".py", ".pyi", ".typed", ".yaml", ".j2", ".css", ".js", ".py.txt")
    data = "planner/hardware/data/"
    expected = {f"translution/{name}" for name in tracked if name.endswith(kept) or name.startswith(data)}
    expected.add("translution/__main__.py")
    with zipfile.ZipFile(built["wheel"]) as archive:
        found = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert found == expected


def test_metadata_are_accepted_by_the_package_index(built: dict[str, Path]) -> None:
    printed = run(sys.executable, "-m", "twine", "check", "--strict", built["wheel"], built["sdist"])
    assert printed.count("PASSED") == 2


def test_the_sdist_has_what_a_build_and_a_reader_need(built: dict[str, Path]) -> None:
    with tarfile.open(built["sdist"]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"README.md", "LICENSE", "pyproject.toml", "planner/__init__.py"} <= names


def test_the_wheel_installed_alone_plans(built: dict[str, Path], tmp_path: Path) -> None:
    """In a fresh environment that has only what the wheel's metadata name."""
    venv.create(tmp_path / "venv")
    python = tmp_path / "venv" / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--python", python)
    run(*pip, "install", "--quiet", "--no-compile", built["wheel"])
    variables = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    words = ["plan", "vit-tiny/56", "--cluster", "2xH100", "--data", "synthetic", "--out", tmp_path / "plan"]
    run(tmp_path / "venv" / "bin" / "translution", *words, cwd=tmp_path, env=variables)
    assert run(python, "-m", "translution", "--version", cwd=tmp_path, env=variables).startswith("translution-scale ")
    plan = json.loads((tmp_path / "plan" / "plan.json").read_text())
    version = tomllib.loads((built["root"] / "pyproject.toml").read_text())["project"]["version"]
    assert plan["made_by"] == f"translution-scale {version}"
    listed = run(*pip, "list", env=variables)
    assert "translution-scale" in listed and "torch" not in listed
