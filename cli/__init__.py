"""The ``translution`` command: options, help and printing. The packages below do the work.

`main` runs one command line. Each command is one module of `commands`.
"""

from __future__ import annotations

import gc
import os
import sys

__all__ = ["main"]


def main() -> None:
    """Run the command line and exit: 0, or 1 after a failed run, 2 for bad input, 3 if no plan fits."""
    # Most objects of a command live until it ends. Garbage collection, now and at exit, would take a tenth of a short
    # command's time.
    gc.disable()
    # Looking for plugins of pydantic, of which this project uses none, reads the metadata of every installed package.
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")
    try:
        from .main import run

        code = run(sys.argv[1:])
        if "triton" not in sys.modules:  # Triton 3.9 prints what is not collected at exit.
            gc.freeze()
    except KeyboardInterrupt:
        # While a module is imported; `run` answers a later one itself.
        print("translution: error: interrupted", file=sys.stderr)
        code = 130
    sys.exit(code)
