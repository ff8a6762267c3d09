"""The ``translution`` command."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line and exit: 0, or 1 for a failed run, 2 for bad input, 3 for no room."""
    from .app import run

    sys.exit(run(sys.argv[1:]))
