#!/usr/bin/env -S python3 -IS
"""A compiler like g++ that compiles all files of an op as one: torch's headers take longer than everything else.

The tests set it as CXX. Ninja asks for every object of an op; the first one that its build file names becomes the whole
op, and the others become empty.
"""

from __future__ import annotations

import os
import sys

COMPILER = "g++"
if __name__ == "__main__" and "-c" not in sys.argv:
    # Every rank asks for the version, and the imports below take longer than the answer.
    os.execvp(COMPILER, [COMPILER, *sys.argv[1:]])

import re  # noqa: E402
import subprocess  # noqa: E402
from pathlib import Path  # noqa: E402

FAST = ["-g0", "-O1"]
"""Debug information and optimization take a third of the time, and tests need neither."""
_OBJECT = re.compile(r"^build (\S+): compile (\S+)$", re.MULTILINE)
_HEADER = re.compile(r'^#include [<"](\S+)[>"].*$', re.MULTILINE)
_LOCAL = re.compile(r"^(?:static|const|static const) [\w:]+ (\w+)(?: =|;)", re.MULTILINE)


class OneSource:
    """The text of several C++ files in one, in which each of the op's own headers stands once.

    Args:
        folders: where to look for headers; what is in none of them stays an `#include`.
    """

    def __init__(self, folders: list[Path]) -> None:
        self._folders, self._seen = folders, set[Path]()

    def text(self, path: Path) -> str:
        """Return the file's text with the headers that no earlier file had."""
        return _HEADER.sub(lambda found: self._header(path.parent, found), path.read_text())

    def _header(self, near: Path, found: re.Match[str]) -> str:
        for folder in [near, *self._folders]:
            path = (folder / found[1]).resolve()
            if path.is_file():
                new = path not in self._seen
                self._seen.add(path)
                return self.text(path) if new else ""
        return found[0]

    def file(self, number: int, path: Path) -> str:
        """Return the text of one of the files; its own variables are renamed, for other files have such names too."""
        text = self.text(path)
        for name in _LOCAL.findall(path.read_text()):
            text = re.sub(rf"\b{name}\b", f"{name}_{number}", text)
        return f"{text}\n"


def own_folders(arguments: list[str]) -> list[Path]:
    """Return the folders of the op's headers; torch's are given as `-isystem`."""
    return [Path(word.removeprefix("-I")) for word in arguments if word.startswith("-I")]


def source_of(made: str, objects: list[tuple[str, str]], arguments: list[str]) -> str:
    """Return the C++ text from which an object is compiled."""
    if made != objects[0][0]:
        return ""
    one = OneSource(own_folders(arguments))
    return "".join(one.file(number, Path(source)) for number, (_, source) in enumerate(objects))


def compile_object(arguments: list[str]) -> int:
    objects = _OBJECT.findall(Path("build.ninja").read_text())
    source = arguments.index("-c") + 1
    made = arguments[arguments.index("-o") + 1]
    command = [COMPILER, *arguments[:source], "-x", "c++", "-", *arguments[source + 1 :], *FAST]
    return subprocess.run(command, input=source_of(made, objects, arguments), text=True).returncode


def main(arguments: list[str]) -> int:
    if "-c" in arguments and Path("build.ninja").exists():
        return compile_object(arguments)
    return subprocess.run([COMPILER, *arguments]).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
