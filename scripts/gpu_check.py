#!/usr/bin/env python3
"""Measure this project on a GPU within minutes: parity, operators, memory, time, the largest model, transfers.

usage: python scripts/gpu_check.py [--out reports/gpu] [--minutes 8] [--parts parity,memory]
       python scripts/gpu_check.py --device cpu --small --out FOLDER     rehearses it without a GPU

docs/gpu.md explains the parts and their results. The package translution must be importable, and this checkout's
benchmarks and tests are used.
"""

from __future__ import annotations

import sys
from pathlib import Path

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


if __name__ == "__main__":
    # Last, since a module of the benchmarks has the name of one of Python's.
    sys.path.append(str(BENCHMARKS))
    from gpu_parts.main import main

    sys.exit(main())
