"""Draw docs/images/plan.svg: what `translution plan` prints in a terminal of 80 columns.

python scripts/pictures/record_plan.py
"""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import MONOKAI
from rich.text import Text

ROOT = Path(__file__).resolve().parents[2]
PICTURE = ROOT / "docs" / "images" / "plan.svg"
COMMAND = "translution plan vit-base/16 --cluster 8xH100"
WIDTH = 80


def draw() -> str:
    """Run the command as in a terminal and return it with its output as SVG.

    Raises:
        subprocess.CalledProcessError: if the command fails.
    """
    terminal = {"COLUMNS": str(WIDTH), "FORCE_COLOR": "1", "TERM": "xterm-256color"}
    words = [sys.executable, "-m", *COMMAND.split()]
    done = subprocess.run(words, env=os.environ | terminal, capture_output=True, text=True, check=True)
    screen = Console(record=True, width=WIDTH, file=io.StringIO(), highlight=False, markup=False)
    for number, line in enumerate(textwrap.wrap(COMMAND, WIDTH - 4)):
        screen.print(Text.assemble(("    " if number else "$ ", "bold green"), (line, "bold")))
    screen.print(Text.from_ansi(done.stdout))
    svg = screen.export_svg(title="translution plan", theme=MONOKAI, unique_id="plan")
    # The fonts are the reader's own: a page loads nothing from the network.
    return re.sub(r"\s*@font-face \{.*?\}", "", svg, flags=re.DOTALL)


if __name__ == "__main__":
    PICTURE.write_text(draw(), encoding="utf-8")
    print(f"wrote {PICTURE.relative_to(ROOT)}")
