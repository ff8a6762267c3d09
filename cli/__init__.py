"""The ``translution`` command."""

from __future__ import annotations

import gc
import sys


def main() -> None:
    """Run the command line and exit: 0, or 1 for a failed run, 2 for bad input, 3 for no room."""
    # A command makes many objects that live to its end. Looking for garbage among them, then and at the
    # interpreter's end, takes a tenth of a short command's time.
    gc.set_threshold(50_000, 20, 20)
    from .main import run

    code = run(sys.argv[1:])
    gc.freeze()
    sys.exit(code)
