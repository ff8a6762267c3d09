#!/usr/bin/env python3
"""A compiler like g++ that parses torch's headers once for all files of an op, instead of once per file.

The tests set it as CXX. Its precompiled headers, hundreds of MB, are removed when the ops are compiled.
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
"""Flag of the only op with enough files to gain time."""
_OWN = ("-MF", "-c", "-o")
"""Flags of a single file, each followed by an argument."""


def shared_flags(arguments: list[str]) -> list[str]:
    """Flags with which all files of an op are compiled, and often those of several ops."""
    flags, skipped = [], False
    for word in arguments:
        if skipped or word in _OWN:
            skipped = not skipped
        elif word != "-MMD" and not word.startswith("-DTORCH_EXTENSION_NAME"):
            flags.append(word)
    return flags


def precompiled(flags: list[str]) -> Path:
    """Return torch's headers precompiled with these flags; the first process that needs them compiles them."""
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
    arguments = [*arguments, "-g0"]  # Debug information takes a third of the time, and nobody needs it.
    if "-c" in arguments and MANY_FILES in arguments:
        arguments = ["-include", str(precompiled(shared_flags(arguments))), *arguments]
    return subprocess.run([COMPILER, *arguments]).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
