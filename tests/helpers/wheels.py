"""Tiny wheels, an sdist and a project of the shape of this one, for tests of packaging without a network."""

from __future__ import annotations

import io
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path

PYPROJECT = """
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"

[project]
name = "translution-scale"
version = "0.1.0"
readme = "README.md"
license-files = ["LICENSE"]
requires-python = ">=3.11"
dependencies = ["pydantic>=2", "packaging"]

[project.optional-dependencies]
train = ["torch>=2.5", "deepspeed>=0.1", "numbers-lib>=2", "pydantic>=2.1"]
dev = ["pytest>=8", "other-tool"]

[tool.setuptools]
packages = ["translution.planner"]

[tool.setuptools.package-dir]
"translution.planner" = "planner"
"""


def write_wheel(
    folder: Path, name: str, version: str, requires: Sequence[str] = (), files: Mapping[str, bytes] | None = None
) -> Path:
    """Write a pure wheel, by default with one empty module, into a folder."""
    stem = f"{name.replace('-', '_')}-{version}"
    contents = dict(files if files is not None else {f"{name.replace('-', '_')}.py": b""})
    head = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    contents[f"{stem}.dist-info/METADATA"] = (head + "".join(f"Requires-Dist: {line}\n" for line in requires)).encode()
    contents[f"{stem}.dist-info/WHEEL"] = (
        b"Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    )
    contents[f"{stem}.dist-info/RECORD"] = "".join(
        f"{path},,\n" for path in [*contents, f"{stem}.dist-info/RECORD"]
    ).encode()
    path = folder / f"{stem}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for file, data in contents.items():
            archive.writestr(file, data)
    return path


def write_installed(folder: Path, name: str) -> Path:
    """Write a wheel of a pure package that is installed here."""
    distribution = metadata.distribution(name)
    files = {
        str(file): Path(str(distribution.locate_file(file))).read_bytes()
        for file in distribution.files or []
        if file.suffix == ".py"
    }
    return write_wheel(folder, name, distribution.version, files=files)


def write_sdist(folder: Path, name: str, version: str, setup: str, requires: Sequence[str] = ()) -> Path:
    """Write an sdist whose setup.py is a text."""
    stem = f"{name}-{version}"
    head = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    contents = {
        "setup.py": setup,
        f"{name}.py": "",
        "PKG-INFO": head + "".join(f"Requires-Dist: {line}\n" for line in requires),
    }
    path = folder / f"{stem}.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        for file, text in contents.items():
            entry = tarfile.TarInfo(f"{stem}/{file}")
            entry.size = len(text.encode())
            archive.addfile(entry, io.BytesIO(text.encode()))
    return path


def write_project(folder: Path) -> None:
    """Write a project that has a planner, an extra `train`, and build files of an earlier version."""
    (folder / "planner" / "__pycache__").mkdir(parents=True)
    (folder / "planner" / "__init__.py").write_text("")
    (folder / "build" / "lib" / "translution" / "planner").mkdir(parents=True)
    (folder / "build" / "lib" / "translution" / "planner" / "removed.py").write_text("")
    (folder / "pyproject.toml").write_text(PYPROJECT)
    (folder / "constraints.txt").write_text("deepspeed==0.19.8\nsmall-lib==1.0\ntorch==2.13.0\n")
    for name in ("README.md", "LICENSE"):
        (folder / name).write_text("text\n")


def make_environment(folder: Path, python: Path | str = sys.executable) -> Path:
    """Make an environment with a copy of this one's pip, and return its Python; `venv` installs pip for ten seconds."""
    subprocess.run([python, "-m", "venv", "--without-pip", folder], check=True, capture_output=True)
    pip = metadata.distribution("pip")
    target = next(folder.glob("lib/python*/site-packages"))
    for name in ("pip", f"pip-{pip.version}.dist-info"):
        shutil.copytree(str(pip.locate_file(name)), target / name)
    return folder / "bin" / "python"
