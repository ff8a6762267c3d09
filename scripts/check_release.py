"""Check that the tree is ready for a release: the tag is the version in pyproject.toml, and CHANGELOG.md has it.

usage: python scripts/check_release.py [TAG]
"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def find_problems(tag: str, root: Path = ROOT) -> list[str]:
    """Return a line for each reason not to release the tag.

    Args:
        tag: the tag, such as ``v1.2.0``.
        root: the repository.
    """
    version = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    changes = (root / "CHANGELOG.md").read_text(encoding="utf-8")
    problems = []
    if tag != f"v{version}":
        problems.append(f"tag: {tag} is not allowed: must be v{version}, the version in pyproject.toml")
    if not re.search(rf"^## \[{re.escape(version)}\] - \d{{4}}-\d\d-\d\d$", changes, re.MULTILINE):
        problems.append(f"CHANGELOG.md: has no heading '## [{version}] - YYYY-MM-DD'")
    return problems


def main(arguments: list[str]) -> int:
    """Print the problems and return the exit code."""
    problems = find_problems(arguments[0]) if arguments else []
    for problem in problems:
        print(f"check_release.py: {problem}", file=sys.stderr)
    return 2 if problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
