"""``translution verify``."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated

import typer

from translution.distributed.runs import find_run
from translution.distributed.verification import read_rehearsal
from translution.planner.common import format_bytes

from ...extras import requires_extra
from ...options import JsonOption
from ...output import console, make_table, print_json
from .. import app
from .rehearse import print_rehearsal


@app.command(
    "verify", epilog="Examples: **translution verify plans/small** · **translution verify plans/small/runs/001 --json**"
)
def verify_cli(
    folder: Annotated[
        Path, typer.Argument(metavar="RUN_FOLDER", help="A run folder, or a plan folder whose newest run is used.")
    ],
    as_json: JsonOption = False,
) -> None:
    """Compare predicted memory with what a run measured."""
    print_verification(folder, as_json=as_json)


def print_verification(folder: Path, *, as_json: bool, kept: bool = True) -> None:
    """Print predicted and measured memory of a run or a rehearsal.

    Args:
        folder: a run folder, or a plan folder whose newest run is used.
        as_json: print JSON instead of a table.
        kept: whether the folder outlives the command, so that its files are worth naming.
    """
    with requires_extra("train"):
        from translution.reports.inputs import compare_run, read_metrics, run_files
    run = find_run(folder)
    rehearsal = read_rehearsal(run)
    if rehearsal is not None:
        print_rehearsal(rehearsal, run, as_json=as_json)
        return
    rows = compare_run(run)
    metrics = read_metrics(run)
    evaluations = metrics[metrics["event"] == "evaluation"]
    last = None if evaluations.empty else evaluations.iloc[-1].get("accuracy")
    accuracy = float(last) if isinstance(last, int | float) and math.isfinite(last) else None
    files = {name: str(path) for name, path in run_files(run).items() if kept}
    if as_json:
        memory = json.loads(rows.to_json(orient="records"))
        print_json({"run": str(run) if kept else None, "accuracy": accuracy, "memory": memory, "files": files})
        return
    cells = [
        (
            str(row["rank"]),
            str(row["tier"]),
            str(row["what"]),
            format_bytes(row["predicted_bytes"]),
            format_bytes(row["measured_bytes"]),
            "" if row["ratio"] != row["ratio"] else f"{row['ratio']:.3f}",
        )
        for row in rows.to_dict("records")
    ]
    columns = ("rank", "tier", "item", "predicted", "measured", "predicted / measured")
    out = console()
    out.print(make_table(f"Memory per rank of {run}" if kept else "Memory per rank", columns, cells, text_columns=3))
    if accuracy is not None:
        out.print(f"accuracy on held-out samples: {accuracy:.2%}")
    for name, path in files.items():
        out.print(f"{name}: {path}", soft_wrap=True)
