#!/usr/bin/env python3
"""Find words that the project does not use, in code, documentation and messages.

Usage: check_wording.py [FILE ...]; without files, every text file that git tracks is read. Prints one line per find
and exits with 1 if there are any.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SUFFIXES = {".py", ".pyi", ".md", ".yaml", ".yml", ".toml", ".sh", ".j2", ".js", ".css", ".txt", ""}
SKIPPED = ("reports/gallery/", "reports/experiments/", "benchmarks/results/", "docs/assets/", "LICENSE")
"""Files that programs or other people wrote."""

RULES = {
    r"so many": "a number, or `n`",
    r"so much": "an amount",
    r"nought": "zero",
    r"likewise": "also",
    r"(go|goes|going|gone|went) on (with|from|in the next|to the same)": "resume, continue",
    r"mend(s|ed|ing)?|mend_\w+": "patch, fix",
    r"amiss": "wrong",
    r"wish(es|ed)?": "constraint, option",
    r"\w*twins?": "simulated ..., counterpart",
    r"whichever (it|they) (is|are)|whoever|whosoever": "name the subject",
    r"what it is that|that (is|are) to be|(is|are) it there that": "a direct sentence",
    r"(?<!memory-)lean(er|est)?|leanest_\w+": "minimal memory",
    r"ledgers?": "memory breakdown",
    r"beats?": "heartbeat; exceeds",
    r"kept for backward": "saved for backward",
    r"beside": "next to, besides, in addition to",
    r"(a|any|one|the same|every|each|that|which|this|another|what) moment|moment (later|late|of it)": (
        "point, time, site; a moment is Adam's"
    ),
    r"for a moment|in a moment": "briefly",
    r"(a|the|every|each) rank's life|life of a rank": "lifecycle",
    r"lets? go of": "release, free",
    r"catalogues?": "catalog",
    r"of the which|thereof|therein|whereof|wherein": "a direct sentence",
}
"""Regular expression for whole words, whatever their case, and what to write instead."""

ALLOWED = {
    ("CHANGELOG.md", "NetworkTwin"),
    ("CHANGELOG.md", "Zero3Twin"),
    ("CHANGELOG.md", "Wishes"),
    ("distributed/checkpoint/reader.py", "oment"),
    ("distributed/runs/heartbeat.py", "control/beat"),
    ("distributed/runs/heartbeat.py", '"beat"'),
    ("docs/clusters.md", "control/beat"),
    ("reports/inputs/run_accuracy.py", '"kept for backward"'),
    ("scripts/check_wording.py", ""),
}
"""File, and a text that excuses the lines that hold it: names in files that users have, and former names."""


def _compiled(words: str) -> re.Pattern[str]:
    return re.compile(rf"(?<![\w-])(?:{words})(?![\w-])", re.IGNORECASE)


_ANY = _compiled("|".join(RULES))
_EACH = {_compiled(words): better for words, better in RULES.items()}


def findings(path: str, text: str) -> list[str]:
    """Return a line per find in the text of a file; ``path`` is relative to the repository."""
    excuses = [excuse for file, excuse in ALLOWED if file == path]
    found = []
    for number, line in enumerate(text.splitlines(), start=1):
        if not _ANY.search(line) or any(excuse in line for excuse in excuses):
            continue
        for pattern, better in _EACH.items():
            match = pattern.search(line)
            if match is not None:
                found.append(f"{path}:{number}: {match[0]!r}: write instead: {better}")
    return found


def tracked_files() -> list[str]:
    """Return the files that git tracks, relative to the repository."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True)
    return [path for path in listed.stdout.split("\0") if path]


def main(arguments: list[str]) -> int:
    """Check the named files, or all; return the exit status."""
    paths = [str(Path(argument).resolve().relative_to(ROOT)) for argument in arguments] or tracked_files()
    found = []
    for path in paths:
        file = ROOT / path
        if file.suffix in SUFFIXES and not path.startswith(SKIPPED) and file.is_file():
            found += findings(path, file.read_text(encoding="utf-8"))
    print(*found, sep="\n", end="\n" if found else "")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
