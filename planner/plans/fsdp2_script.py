"""The training script of a plan for FSDP2, which the plan folder holds as ``train_fsdp2.py``.

It is a text file of this package: the user runs it, and nothing here imports it.
"""

from __future__ import annotations

from pathlib import Path

FSDP2_SCRIPT_FILE = "train_fsdp2.py"


def fsdp2_script() -> str:
    """Return the script's text; it reads its plan from the folder in which it lies."""
    return Path(__file__).with_name(f"{FSDP2_SCRIPT_FILE}.txt").read_text(encoding="utf-8")
