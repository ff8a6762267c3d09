#!/usr/bin/env python3
"""Compiles as g++ does, but parses torch's headers once for the many files of an op instead of once for each.

The tests name it as CXX. What it makes beside the ops, hundreds of MB, goes when they are compiled.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import subprocess
import sys
from pathlib import Path

COMPILER = "g++"
FOLDER = "precompiled"
MANY_FILES = "-DTORCH_EXTENSION_NAME=async_io"
"""Only this op has so many that it pays."""
_OWN = ("-MF", "-c", "-o")
"""Flags of one file, each with a word that follows."""


def shared_flags(arguments: list[str]) -> list[str]:
    """What all files of an op, and mostly of several, are compiled with."""
    flags, skipped = [], False
    for word in arguments:
        if skipped or word in _OWN:
            skipped = not skipped
        elif word != "-MMD" and not word.startswith("-DTORCH_EXTENSION_NAME"):
            flags.append(word)
    return flags


def precompiled(flags: list[str]) -> Path:
    """torch's headers as these flags compile them, made by whoever needs them first."""
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR", Path.home() / ".cache" / "torch_extensions"))
    own = [word for word in flags if not word.startswith("-I")]
    header = root / FOLDER / hashlib.sha256(repr(own).encode()).hexdigest()[:16] / "all.h"
    header.parent.mkdir(parents=True, exist_ok=True)
    with (header.parent / "made").open("a+") as made:
        fcntl.flock(made, fcntl.LOCK_EX)
        made.seek(0)
        if not made.read():
            header.write_text("#include <torch/extension.h>\n")
            command = [COMPILER, *flags, "-x", "c++-header", str(header), "-o", f"{header}.gch"]
            subprocess.run(command, check=True)
            made.write("yes\n")
    return header


def main(arguments: list[str]) -> int:
    arguments = [*arguments, "-g0"]  # Nobody debugs them, and it takes a third of the time.
    if "-c" in arguments and MANY_FILES in arguments:
        arguments = ["-include", str(precompiled(shared_flags(arguments))), *arguments]
    return subprocess.run([COMPILER, *arguments]).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
