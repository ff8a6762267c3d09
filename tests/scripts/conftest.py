"""An offline bundle of a tiny project, made of tiny packages without a network."""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from helpers.wheels import write_installed, write_project, write_sdist, write_wheel

ROOT = Path(__file__).resolve().parents[2]
PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"
SETUP = """
import os
from setuptools import Distribution, setup

class Compiled(Distribution):
    def has_ext_modules(self):
        return os.environ.get("DS_BUILD_OPS") != "0" or os.environ.get("BUILD_CUDA_EXTENSIONS") != "0"

setup(name="deepspeed", version="{version}", py_modules=["deepspeed"], distclass=Compiled,
      install_requires=["torch>=2", "small-lib", "numbers-lib", "early; python_version < '3.12'",
                        "late; python_version >= '3.12'"])
"""
"""Like DeepSpeed's: it compiles for this machine unless it is told not to."""


@pytest.fixture(scope="session")
def bundle_script() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "scripts"))
        yield importlib.import_module("offline_bundle")


@pytest.fixture(scope="session")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with packages."""
    folder = tmp_path_factory.mktemp("index")
    write_installed(folder, "packaging")
    write_wheel(folder, "pydantic", "2.2", ["core-lib"])
    for name in ("core-lib", "heavy-lib", "early", "late", "pytest", "pytest-lib", "other-tool"):
        write_wheel(folder, name, "9.0")
    write_wheel(folder, "numbers-lib", "2.5", ["heavy-lib"])
    for version in ("1.0", "1.1"):
        write_wheel(folder, "small-lib", version)
    for version in ("0.19.8", "0.20.0"):
        write_sdist(folder, "deepspeed", version, SETUP.format(version=version))
    return folder


@pytest.fixture(scope="module")
def package_index(packages: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """That folder as all that pip and uv find, without a network, in the tests of one module."""
    with only_from(packages, tmp_path_factory.mktemp("uv")):
        yield packages


@contextlib.contextmanager
def only_from(folder: Path, cache: Path) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"NO_INDEX": "1", "FIND_LINKS": str(folder)}.items():
            patch.setenv(f"PIP_{name}", value)
            patch.setenv(f"UV_{name}", value)
        patch.setenv("UV_OFFLINE", "1")
        patch.setenv("UV_CACHE_DIR", str(cache))
        yield


@pytest.fixture(scope="session")
def tiny_project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("project")
    write_project(folder)
    return folder


@pytest.fixture(scope="session")
def names_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the machine has, as the machine's owner writes it; the planner needs one of the packages."""
    path = tmp_path_factory.mktemp("names") / "present.txt"
    path.write_text("# present\nNumbers_Lib  # tables\ncore-lib\n\npytest\n")
    return path


@pytest.fixture(scope="session")
def made_bundle(
    bundle_script: ModuleType,
    packages: Path,
    tiny_project: Path,
    names_file: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A bundle for the Python that runs the tests."""
    folder = tmp_path_factory.mktemp("made") / "offline"
    words = ["--project", str(tiny_project), "--without", str(names_file), "--python", PYTHON, "--out", str(folder)]
    with only_from(packages, tmp_path_factory.mktemp("uv")):
        assert bundle_script.main(words) == 0
    return folder
