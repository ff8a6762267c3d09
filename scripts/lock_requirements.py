"""Write the lock files in requirements/: every package that this project's environments hold, with its hashes.

Also lowest.txt: the oldest packages that pyproject.toml allows, which `make test-matrix` tries.

    make lock

uv chooses the newest versions that pyproject.toml and constraints.txt allow, for all Pythons from 3.11 on and all
platforms. install_locked.sh installs them. The CPU builds of torch are in an index of their own; without access to it
their hashes stay as they are, as long as torch's version does.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOCKS = ROOT / "requirements"
USED = ("train", "report", "serve", "tensorboard")
"""Extras that a user installs."""
EXTRAS = {"demo.lock": ("train", "report"), "use.lock": (*USED, "8bit"), "dev.lock": (*USED, "8bit", "dev")}
"""Lock files, with the extras whose packages they hold; each holds only what those before it lack."""
BUILD_TOOLS = ("setuptools",)
"""What builds this project, and the packages that come as source."""
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
_CUDA = re.compile(r"(nvidia|cuda)-.*|triton")
"""Packages that only torch's CUDA build needs."""
LEFT_OUT = ("torchvision",)
"""What no environment here holds: PyPI has only builds of torchvision for CUDA, and of timm's tests none needs it."""
TESTED_WITHOUT_CUDA = ("triton",)
"""Those of them that the tests need with torch's CPU build, too: the last lock repeats them."""
_HASHED = ("--universal", "--generate-hashes")
_HEAD = "# Made by `make lock`; do not edit.\n"

Entries = dict[str, list[str]]
"""Blocks of a requirements file, each a requirement with its hashes, by the name of the package."""


def read_entries(text: str) -> Entries:
    """Return the blocks of a requirements file; a package has several if its version depends on the Python."""
    entries: Entries = {}
    for block in re.findall(r"^[A-Za-z0-9].*?(?:[^\\]\n|\Z)", text, re.MULTILINE | re.DOTALL):
        entries.setdefault(re.split(r"[=\s\[;]", block, maxsplit=1)[0], []).append(block)
    return entries


def split_locks(resolved: dict[str, Entries], cpu_torch: str) -> dict[str, str]:
    """Return the lock files by their names.

    Args:
        resolved: for each name in `EXTRAS` its resolution, with torch's CUDA build.
        cpu_torch: block of torch's CPU build.
    """
    whole = resolved["dev.lock"]
    special = {name for name in whole if name in ("torch", *BUILD_TOOLS, *LEFT_OUT) or _CUDA.fullmatch(name)}
    locks = {
        "build.lock": [name for name in whole if name in BUILD_TOOLS],
        "torch-cuda.lock": [name for name in whole if name == "torch" or _CUDA.fullmatch(name)],
    }
    done = special
    for lock in EXTRAS:
        locks[lock] = [name for name in resolved[lock] if name not in done]
        done = done | set(locks[lock])
    locks["dev.lock"] = [name for name in whole if name in locks["dev.lock"] or name in TESTED_WITHOUT_CUDA]
    texts = {lock: "".join(block for name in names for block in whole[name]) for lock, names in locks.items()}
    return {lock: _HEAD + text for lock, text in (texts | {"torch-cpu.lock": cpu_torch}).items()}


def _compile(words: Sequence[str], asked: Iterable[str]) -> str:
    """Return uv's resolution as the text of a requirements file.

    Raises:
        SystemExit: with uv's errors.
    """
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "asked.in"
        source.write_text("\n".join(asked))
        command = [sys.executable, "-m", "uv", "pip", "compile", "--quiet", "--no-header", "--no-annotate",
                   "--python-version", "3.11", *words, str(source)]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        raise SystemExit(f"lock_requirements.py: uv failed:\n{done.stderr.strip()}")
    return done.stdout


def _asked(extras: Iterable[str]) -> list[str]:
    """Return the requirements of the project with some extras, and with those that these name."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = [*project["dependencies"]]
    waiting = list(extras)
    while waiting:
        for line in project["optional-dependencies"][waiting.pop()]:
            own = re.fullmatch(rf"{project['name']}\[(.*)\]", line)
            if own:
                waiting += own[1].split(",")
            else:
                lines.append(line)
    return lines


def _cpu_torch(version: str, index: str) -> str:
    """Return the block of torch's CPU build, from its index or else from the present lock."""
    pinned = f"torch=={version}+cpu"
    try:
        (block,) = read_entries(_compile([*_HASHED, "--no-deps", "--default-index", index], [pinned]))["torch"]
    except SystemExit:
        present = read_entries((LOCKS / "torch-cpu.lock").read_text(encoding="utf-8")).get("torch", [""])[0]
        if not present.startswith(f"{pinned} "):
            raise
        print(f"note: {index} cannot be reached: the hashes of {pinned} stay as they are", file=sys.stderr)
        return present
    return block


def main(words: Sequence[str] | None = None) -> int:
    """Write the lock files; return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--torch-index", default=CPU_INDEX, help="index of torch's CPU builds")
    arguments = parser.parse_args(words)
    resolved: dict[str, Entries] = {}
    for lock, extras in reversed(EXTRAS.items()):
        # The smaller environments have the versions of the largest one.
        pins = [block.partition(" \\")[0] for blocks in resolved.get("dev.lock", {}).values() for block in blocks]
        with tempfile.NamedTemporaryFile("w", suffix=".txt") as chosen:
            chosen.write("\n".join(pins))
            chosen.flush()
            options = ["--constraint", "constraints.txt", "--constraint", chosen.name]
            resolved[lock] = read_entries(_compile([*_HASHED, *options], _asked(extras)))
    torch = resolved["dev.lock"]["torch"][0].partition(" ")[0].partition("==")[2]
    for name, text in split_locks(resolved, _cpu_torch(torch, arguments.torch_index)).items():
        (LOCKS / name).write_text(text, encoding="utf-8")
    oldest = _compile(["--resolution", "lowest-direct", "--python-platform", "x86_64-manylinux_2_28"], _asked(USED))
    (LOCKS / "lowest.txt").write_text(_HEAD + oldest, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
