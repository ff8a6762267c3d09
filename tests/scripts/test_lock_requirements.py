"""The locks hold every package with its hashes, the oldest allowed ones are those that were tried, and pip obeys."""

from __future__ import annotations

import hashlib
import os
import runpy
import shutil
import subprocess
import tomllib
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from helpers.wheels import make_environment, write_wheel
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[2]
LOCKS = ROOT / "requirements"
SCRIPT: dict[str, Any] = runpy.run_path(str(ROOT / "scripts" / "lock_requirements.py"))


def requirement(block: str) -> Requirement:
    return Requirement(block.partition(" \\")[0])


def locked() -> dict[str, list[str]]:
    """The blocks of all locks, by package."""
    found: dict[str, list[str]] = {}
    for path in sorted(LOCKS.glob("*.lock")):
        for name, blocks in SCRIPT["read_entries"](path.read_text()).items():
            found.setdefault(name, []).extend(blocks)
    return found


def direct(*extras: str) -> list[Requirement]:
    return [Requirement(line) for line in SCRIPT["_asked"](extras)]


def test_every_package_is_pinned_with_hashes() -> None:
    for name, blocks in locked().items():
        for block in blocks:
            (pin,) = requirement(block).specifier
            assert pin.operator == "==", block
            assert "--hash=sha256:" in block, name


def test_the_locks_hold_what_pyproject_and_constraints_ask_for() -> None:
    found = locked()
    for asked in direct("train", "report", "dev"):
        blocks = found[canonicalize_name(asked.name)]
        assert all(asked.specifier.contains(next(iter(requirement(block).specifier)).version) for block in blocks)
    for line in (ROOT / "constraints.txt").read_text().split():
        name, _, version = line.partition("==")
        assert {next(iter(requirement(block).specifier)).version.partition("+")[0] for block in found[name]} == {
            version
        }


def test_the_locks_hold_what_their_packages_need() -> None:
    found, environment = locked(), {**default_environment(), "extra": ""}
    for name in found:
        try:
            needed = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue  # of another platform or Python
        for line in needed:
            asked = Requirement(line)
            if asked.name not in SCRIPT["LEFT_OUT"] and (asked.marker is None or asked.marker.evaluate(environment)):
                assert canonicalize_name(asked.name) in found, f"{name} needs {line}"


def test_the_lower_bounds_are_the_versions_that_the_matrix_tries() -> None:
    tried = {}
    for name, (block,) in SCRIPT["read_entries"]((LOCKS / "lowest.txt").read_text()).items():
        tried[name] = Version(next(iter(requirement(block.strip()).specifier)).version)
    for asked in direct("train", "report", "serve", "tensorboard"):
        bounds = [Version(each.version) for each in asked.specifier if each.operator == ">="]
        assert bounds == [tried[canonicalize_name(asked.name)]], asked
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    assert [str(Requirement(line).specifier) for line in build] == [f">={tried['setuptools']}"]


def test_locks_are_split_by_who_needs_them() -> None:
    read, blocks = SCRIPT["read_entries"], {}
    for name in (
        "torch==2",
        "nvidia-x==1",
        "triton==3",
        "setuptools==80",
        "numpy==2 ; python_version < '3.12'",
        "mypy==1",
    ):
        blocks[name.partition("==")[0]] = f"{name} \\\n    --hash=sha256:{name[:2]}\n"
    small = read("".join(text for name, text in blocks.items() if name != "mypy"))
    more = "numpy==3 ; python_version >= '3.12' \\\n    --hash=sha256:n3\n"
    whole = read("# head\n" + "".join(blocks.values()) + more)
    small["numpy"] = whole["numpy"]
    locks = SCRIPT["split_locks"]({"demo.lock": small, "use.lock": small, "dev.lock": whole}, "torch==2+cpu\n")
    bodies = {name: "".join(text.splitlines(keepends=True)[1:]) for name, text in locks.items()}
    assert bodies == {
        "build.lock": blocks["setuptools"],
        "torch-cpu.lock": "torch==2+cpu\n",
        "torch-cuda.lock": blocks["torch"] + blocks["nvidia-x"] + blocks["triton"],
        "demo.lock": blocks["numpy"] + more,
        "use.lock": "",
        "dev.lock": blocks["triton"] + blocks["mypy"],
    }


def write_lock(path: Path, *wheels: Path) -> None:
    lines = []
    for wheel in wheels:
        name, version, *_ = wheel.name.split("-")
        lines.append(f"{name}=={version} --hash=sha256:{hashlib.sha256(wheel.read_bytes()).hexdigest()}\n")
    path.write_text("".join(lines))


@pytest.fixture(scope="module")
def own_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with pip and this environment's setuptools, which builds the project."""
    folder = tmp_path_factory.mktemp("environment")
    python = make_environment(folder)
    site = Path(str(metadata.distribution("setuptools").locate_file("")))
    for found in (*site.glob("setuptools*"), site / "_distutils_hack"):
        shutil.copytree(found, next(folder.glob("lib/python*/site-packages")) / found.name)
    return python


@pytest.fixture
def own_project(tmp_path: Path) -> Path:
    """A project with the script, which needs the package small."""
    for name in ("scripts", "requirements"):
        (tmp_path / "project" / name).mkdir(parents=True)
    shutil.copy(ROOT / "scripts" / "install_locked.sh", tmp_path / "project" / "scripts")
    (tmp_path / "project" / "pyproject.toml").write_text(
        '[build-system]\nrequires = ["setuptools"]\nbuild-backend = "setuptools.build_meta"\n'
        '[project]\nname = "own"\nversion = "1"\ndependencies = ["small"]\n[tool.setuptools]\npackages = []\n'
    )
    return tmp_path / "project"


@pytest.mark.slow
def test_only_packages_with_their_hashes_are_installed(own_python: Path, own_project: Path, tmp_path: Path) -> None:
    index, locks = tmp_path / "index", own_project / "requirements"
    index.mkdir()
    small, cpu = write_wheel(index, "small", "1.0"), write_wheel(index, "torch", "2.0+cpu")
    cuda = [write_wheel(index, "torch", "2.0", ["nvidia-x"]), write_wheel(index, "nvidia_x", "1.0")]
    write_wheel(index, "small", "2.0")
    for name, wheels in {"build": [], "torch-cpu": [cpu], "torch-cuda": cuda, "dev": [small]}.items():
        write_lock(locks / f"{name}.lock", *wheels)
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "PYTHON"))}
    variables |= {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(index), "PIP_CONFIG_FILE": os.devnull}

    def install() -> tuple[int, str]:
        words = ["sh", str(own_project / "scripts" / "install_locked.sh"), str(own_python), str(locks / "dev.lock")]
        done = subprocess.run(words, env=variables, capture_output=True, text=True)
        return done.returncode, done.stderr

    def versions() -> set[str]:
        site = next(own_python.parents[1].glob("lib/python*/site-packages"))
        return {path.name.removesuffix(".dist-info") for path in site.glob("*.dist-info")} - before

    def uninstall(*names: str) -> None:
        subprocess.run([own_python, "-m", "pip", "uninstall", "--quiet", "--yes", *names], check=True)

    before: set[str] = set()
    before = versions()
    moved = cpu.rename(tmp_path / cpu.name)
    assert install() == (0, "")
    assert versions() == {"own-1", "small-1.0", "torch-2.0", "nvidia_x-1.0"}
    moved.rename(cpu)
    assert install() == (0, "")
    assert versions() == {"own-1", "small-1.0", "torch-2.0+cpu", "nvidia_x-1.0"}

    uninstall("small")
    write_wheel(index, "small", "1.0", files={"small.py": b"evil = True"})
    code, errors = install()
    assert code != 0
    assert "DO NOT MATCH THE HASHES" in errors
    assert versions() == {"own-1", "torch-2.0+cpu", "nvidia_x-1.0"}
    (locks / "dev.lock").write_text("")
    code, errors = install()
    assert code != 0
    assert "own 1 requires small, which is not installed." in errors

    uninstall("torch")
    write_wheel(index, "torch", "2.0+cpu", files={"torch.py": b"evil = True"})
    code, errors = install()
    assert code != 0
    assert "DO NOT MATCH THE HASHES" in errors
    assert versions() == {"own-1", "nvidia_x-1.0"}
