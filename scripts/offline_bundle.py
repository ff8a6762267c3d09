"""Collect the wheels that a machine without a network needs to run this project, in one folder.

    python scripts/offline_bundle.py --out build/offline

The machine has Python and torch; the folder brings this project, DeepSpeed and what else is missing, for Linux on
x86-64, with install_offline.sh. `constraints.txt` pins versions. uv chooses the others for the machine's Python and
leaves out what the machine has (offline_present.txt); pip downloads them.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from offline_check import requirements
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from translution.planner import InputError, TranslutionError

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ROOT / "scripts"
BUILT_HERE = ("deepspeed", "fairscale")
"""Packages without wheels in the index. They are built here, without compiled ops, so that they fit every machine."""
TEST_TOOLS = ("pytest", "hypothesis")
"""What a machine needs of the extra `dev` to run the tests that need a GPU."""
PLATFORMS = (*(f"manylinux_2_{minor}_x86_64" for minor in range(28, 4, -1)), "manylinux2014_x86_64",
             "manylinux2010_x86_64", "manylinux1_x86_64")  # fmt: skip
"""Tags of wheels that run with glibc 2.28 or newer, the preferred first; pip compares tags by name."""
MIB = 2**20


@dataclass(frozen=True)
class Order:
    """What to bundle: a project's folder, the target's Python such as 3.12, extras, and packages to leave out."""

    project: Path
    python: str
    extras: tuple[str, ...]
    left_out: frozenset[str]
    limit_bytes: int


def read_names(path: Path) -> frozenset[str]:
    """Return the canonical names in a file: one a line, with comments after `#`.

    Raises:
        InputError: naming a line that is no name, or a file that cannot be read.
    """
    names = set()
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--without: {path} cannot be read: {error}") from error
    for number, line in enumerate(lines, start=1):
        name = line.partition("#")[0].strip()
        if name and not re.fullmatch(r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?", name):
            raise InputError(f"--without: {path}:{number}: {name!r} is no package's name; one name a line is allowed")
        if name:
            names.add(canonicalize_name(name))
    return frozenset(names)


def _run(command: Sequence[str | Path], what: str, environment: dict[str, str] | None = None) -> str:
    """Return what a command prints.

    Raises:
        TranslutionError: with the last line of its errors.
    """
    result = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, env={**os.environ, **(environment or {})}
    )
    if result.returncode:
        lines = [line.strip() for line in (result.stderr or result.stdout).splitlines() if line.strip()]
        raise TranslutionError(f"{what} failed: {lines[-1] if lines else f'exit status {result.returncode}'}")
    return result.stdout


def _pyproject(project: Path) -> dict[str, Any]:
    return tomllib.loads((project / "pyproject.toml").read_text(encoding="utf-8"))


def _build(source: str | Path, constraints: Path, out: Path) -> None:
    """Build a wheel that fits every machine: without compiled ops, with the same bytes whenever it is built."""
    environment = {"DS_BUILD_OPS": "0", "BUILD_CUDA_EXTENSIONS": "0", "SOURCE_DATE_EPOCH": "946684800"}
    before = set(out.glob("*.whl"))
    _run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-cache-dir",
         "--constraint", constraints, "--wheel-dir", out, source],
        f"building a wheel of {source}", environment,
    )  # fmt: skip
    for wheel in set(out.glob("*.whl")) - before:
        if not wheel.name.endswith("-none-any.whl"):
            raise TranslutionError(f"{wheel.name} holds compiled code; it would fit this machine only")


def build_wheels(order: Order, out: Path) -> None:
    """Build the project's wheel, and those of the requirements that have none in the index, into `out`."""
    document = _pyproject(order.project)
    constraints = order.project / "constraints.txt"
    lines = [line for extra in order.extras for line in document["project"]["optional-dependencies"][extra]]
    for line in lines:
        if canonicalize_name(Requirement(line).name) in BUILT_HERE:
            _build(line, constraints, out)
    with tempfile.TemporaryDirectory() as folder:
        # setuptools would take files of earlier builds from build/lib, and leave its own there.
        copy = Path(folder) / "project"
        copy.mkdir()
        for name in ("pyproject.toml", document["project"]["readme"], *document["project"]["license-files"]):
            shutil.copy(order.project / name, copy)
        for name in document["tool"]["setuptools"]["package-dir"].values():
            shutil.copytree(order.project / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        _build(copy, constraints, out)


def resolve(order: Order, wheels: Path) -> list[str]:
    """Return the packages to bundle as `name==version`, all that the planner needs among them.

    Args:
        order: what to bundle.
        wheels: folder with the wheels that were built.
    """
    project = _pyproject(order.project)["project"]
    name, version = project["name"], project["version"]
    tools = [
        line
        for line in project["optional-dependencies"].get("dev", [])
        if canonicalize_name(Requirement(line).name) in TEST_TOOLS
    ]
    planner = _compile(order, [f"{name}=={version}"], frozenset({"torch"}), wheels)
    whole = {line.partition("==")[0] for line in planner}
    extras = ",".join(order.extras)
    return _compile(order, [f"{name}[{extras}]=={version}", *tools], (order.left_out - whole) | {"torch"}, wheels)


def _compile(order: Order, lines: Sequence[str], excluded: Iterable[str], wheels: Path) -> list[str]:
    """Return pinned requirements for the target's Python, without excluded packages and what only they need."""
    with tempfile.TemporaryDirectory() as folder:
        asked, left_out = Path(folder) / "asked.in", Path(folder) / "left_out.txt"
        asked.write_text("\n".join(lines))
        left_out.write_text("\n".join(sorted(excluded)))
        printed = _run(
            [sys.executable, "-m", "uv", "pip", "compile", "--quiet", "--no-header", "--no-annotate", "--no-build",
             "--python", sys.executable, "--python-version", order.python, "--python-platform", "x86_64-manylinux_2_28",
             "--constraint", order.project / "constraints.txt", "--excludes", left_out, *_links(wheels), asked],
            "choosing versions",
        )  # fmt: skip
    return [line.partition(" ")[0] for line in printed.splitlines() if "==" in line]


def _links(wheels: Path) -> list[str]:
    """Return uv's options for packages in folders; the option alone would replace the user's variable."""
    folders = [str(wheels), *filter(None, os.environ.get("UV_FIND_LINKS", "").split(","))]
    return [word for folder in folders for word in ("--find-links", folder)]


def download(order: Order, pinned: Sequence[str], out: Path) -> None:
    """Download the wheels that `out` lacks, for the target's Python on Linux and x86-64."""
    have = {(canonicalize_name(wheel.metadata["Name"]), wheel.version) for wheel in distributions(out)}
    lacking = [
        line for line in pinned if (canonicalize_name(line.partition("==")[0]), line.partition("==")[2]) not in have
    ]
    if lacking:
        platforms = [word for platform in PLATFORMS for word in ("--platform", platform)]
        _run(
            [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--dest", out,
             "--python-version", order.python, "--implementation", "cp", *platforms, *lacking],
            "downloading wheels",
        )  # fmt: skip


def distributions(folder: Path) -> list[metadata.Distribution]:
    """Return the metadata of the wheels in a folder, in order of their files' names."""
    return [next(iter(metadata.distributions(path=[str(path)]))) for path in sorted(folder.glob("*.whl"))]


def expected(order: Order, folder: Path) -> dict[str, str]:
    """Return what the wheels of a folder need and the folder has not: the versions that fit, by package."""
    environment = {**default_environment(), "python_version": order.python, "python_full_version": f"{order.python}.0",
                   "sys_platform": "linux", "platform_system": "Linux", "platform_machine": "x86_64",
                   "os_name": "posix", "implementation_name": "cpython",
                   "platform_python_implementation": "CPython"}  # fmt: skip
    wheels = distributions(folder)
    have = {canonicalize_name(wheel.metadata["Name"]) for wheel in wheels}
    needed = requirements(wheels, order.extras, environment)
    return {name: str(versions) for name, versions in needed.items() if name not in have}


def write_lists(order: Order, folder: Path) -> None:
    """Write MANIFEST (Python, extras, wheels, what the machine must have) and SHA256SUMS of all files."""
    lines = [f"python {order.python}", f"extras {' '.join(order.extras)}"]
    lines += [
        f"wheel {canonicalize_name(wheel.metadata['Name'])} {wheel.version} {path.name}"
        for wheel, path in zip(distributions(folder), sorted(folder.glob("*.whl")), strict=True)
    ]
    lines += [f"expects {name}{versions}" for name, versions in expected(order, folder).items()]
    (folder / "MANIFEST").write_text("\n".join(lines) + "\n", encoding="utf-8")
    sums = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in sorted(folder.iterdir())]
    (folder / "SHA256SUMS").write_text("".join(sums), encoding="utf-8")


def check_size(folder: Path, limit_bytes: int) -> int:
    """Return a folder's size in bytes.

    Raises:
        TranslutionError: naming the largest files if it is above the limit.
    """
    sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
    total_bytes = sum(sizes.values())
    if total_bytes > limit_bytes:
        largest = ", ".join(
            f"{name} {sizes[name] / MIB:.1f} MiB" for name in sorted(sizes, key=sizes.__getitem__, reverse=True)[:3]
        )
        raise TranslutionError(
            f"the bundle has {total_bytes / MIB:.1f} MiB, more than the {limit_bytes / MIB:g} MiB of --limit-mib; "
            f"largest: {largest}; name packages that the machine has in the file of --without"
        )
    return total_bytes


def bundle(order: Order, out: Path) -> int:
    """Write the bundle into a folder and return its size in bytes; an earlier bundle there is replaced.

    Raises:
        InputError: if the folder holds other files.
        TranslutionError: if a wheel cannot be had, or the bundle is larger than the limit; an earlier bundle stays.
    """
    if out.exists() and not (out.is_dir() and ((out / "MANIFEST").exists() or not any(out.iterdir()))):
        raise InputError(f"--out: {out} holds other files; name a new or an empty folder")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".offline-") as made:
        folder = Path(made) / "bundle"
        folder.mkdir()
        build_wheels(order, folder)
        download(order, resolve(order, folder), folder)
        for name in ("install_offline.sh", "offline_check.py"):
            shutil.copy(SCRIPTS / name, folder)
        write_lists(order, folder)
        size_bytes = check_size(folder, order.limit_bytes)
        shutil.rmtree(out, ignore_errors=True)
        folder.rename(out)
    return size_bytes


def _order(arguments: argparse.Namespace) -> Order:
    """Return what the options ask for.

    Raises:
        InputError: naming an option whose value is not allowed.
    """
    if not re.fullmatch(r"3\.\d+", arguments.python):
        raise InputError(f"--python: {arguments.python!r} is not allowed; a version such as 3.12 is")
    known = _pyproject(arguments.project)["project"]["optional-dependencies"]
    extras = tuple(extra for extra in arguments.extras.split(",") if extra)
    for extra in extras:
        if extra not in known:
            raise InputError(f"--extras: {extra!r} is not allowed; allowed, with commas between: {', '.join(known)}")
    included = {canonicalize_name(name) for name in arguments.include}
    if "torch" in included:
        raise InputError("--include: torch is not allowed; a bundle never replaces the machine's torch")
    left_out = read_names(arguments.without)
    if unknown := sorted(included - left_out):
        raise InputError(f"--include: {unknown[0]!r} is not allowed; the names in {arguments.without} are")
    if not 0 < arguments.limit_mib < math.inf:
        raise InputError(f"--limit-mib: {arguments.limit_mib:g} is not allowed; a number above 0 is")
    return Order(arguments.project, arguments.python, extras, left_out - included, int(arguments.limit_mib * MIB))


def main(words: Sequence[str] | None = None) -> int:
    """Write a bundle as the options say; return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "offline", help="the bundle's folder")
    parser.add_argument("--python", default="3.12", help="the machine's Python (default: 3.12)")
    parser.add_argument("--extras", default="train", help="extras of the project, with commas between (default: train)")
    parser.add_argument("--without", type=Path, default=SCRIPTS / "offline_present.txt", metavar="NAMES-FILE",
                        help="file with the packages that the machine has")  # fmt: skip
    parser.add_argument(
        "--include", nargs="+", default=[], metavar="NAME", help="bundle these names of the file anyway"
    )
    parser.add_argument("--limit-mib", type=float, default=60, help="largest size of the folder (default: 60)")
    parser.add_argument("--project", type=Path, default=ROOT, help=argparse.SUPPRESS)
    arguments = parser.parse_args(words)
    try:
        order = _order(arguments)
        size_bytes = bundle(order, arguments.out)
    except TranslutionError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    wheels = distributions(arguments.out)
    print(f"wrote {arguments.out}: {len(wheels)} wheels for Python {order.python}, {size_bytes / MIB:.1f} MiB")
    print(f"left out, the machine must have: {', '.join(expected(order, arguments.out)) or 'nothing'}")
    print("(--include NAME bundles one of these, except torch)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
