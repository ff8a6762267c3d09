#!/usr/bin/env python3
"""Disturb runs of two ranks in some twenty ways, check how they end, and write the fault table.

usage: python scripts/faults.py [--out reports/faults.md] [NAME ...]
"""

from __future__ import annotations

import sys
from pathlib import Path

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"

if __name__ == "__main__":
    # Last, since a module of the benchmarks has the name of one of Python's.
    sys.path.append(str(BENCHMARKS))
    from fault_parts.table import main

    sys.exit(main())
