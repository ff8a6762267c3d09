"""A stand-in for DeepSpeed in processes that compile its ops: its builders write empty libraries."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from translution.distributed.system.compile_times import OPS

_ACCELERATOR = """
import os, pathlib, subprocess, sys

LIBRARIES = {libraries!r}
root = pathlib.Path({root!r})


class Builder:
    def __init__(self, name):
        self.name = name

    def load(self):
        with (root / "loaded").open("a") as file:
            file.write(self.name + " " + os.environ["MAX_JOBS"] + "\\n")
        if (root / self.name).is_fifo():
            # Like ninja, which gives a compiler a process group of its own.
            subprocess.run(["cat", str(root / self.name)], process_group=0, check=True)
        if self.name + os.environ.get("FAKE_HOST", "") in (root / "failing").read_text().split():
            sys.exit("no such header")
        library = pathlib.Path(os.environ["TORCH_EXTENSIONS_DIR"], LIBRARIES[self.name], LIBRARIES[self.name] + ".so")
        library.parent.mkdir(parents=True, exist_ok=True)
        if not library.exists():
            library.touch()


class Accelerator:
    create_op_builder = Builder


get_accelerator = Accelerator
"""


def compilers(folder: Path) -> list[int]:
    """Return the processes that compile into a folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if f"TORCH_EXTENSIONS_DIR={folder}".encode() in path.read_bytes():
                found.append(int(path.parent.name))
    return found


class FakeOps:
    """The folders of the stand-in.

    Args:
        root: empty folder for its files.
    """

    def __init__(self, root: Path) -> None:
        self.root, self.extensions, self.python = root, root / "extensions", root / "python"
        package = self.python / "deepspeed" / "accelerator"
        package.mkdir(parents=True)
        self.extensions.mkdir()
        (package.parent / "__init__.py").touch()
        libraries = {op: source.library for op, source in OPS.items()}
        (package / "__init__.py").write_text(_ACCELERATOR.format(libraries=libraries, root=str(root)))
        (root / "failing").touch()

    def library(self, op: str) -> Path:
        """Path of an op's compiled library."""
        return self.extensions / OPS[op].library / f"{OPS[op].library}.so"

    def fail(self, *ops: str) -> None:
        """Let these ops fail to compile; an op's name followed by a host's fails only there."""
        (self.root / "failing").write_text(" ".join(ops))

    def block(self, op: str) -> Path:
        """Let an op wait until something is written to the returned FIFO."""
        os.mkfifo(self.root / op)
        return self.root / op

    def loaded(self) -> list[str]:
        """Names of the ops in the order in which they were loaded, and the number of jobs of each."""
        path = self.root / "loaded"
        return path.read_text().splitlines() if path.exists() else []
