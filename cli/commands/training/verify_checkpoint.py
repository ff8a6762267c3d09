"""``translution verify-checkpoint``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from translution.planner.common import format_bytes

from ...extras import requires_extra
from ...options import JsonOption
from ...output import console, print_json
from ...progress import WorkProgress
from .. import app


@app.command(
    "verify-checkpoint",
    epilog="Example: **translution verify-checkpoint plans/small/runs/001**",
)
def verify_checkpoint_cli(
    run_folder: Annotated[
        Path,
        typer.Argument(
            metavar="RUN_FOLDER",
            help="Run folder whose checkpoints are verified, or a plan folder whose newest run is.",
        ),
    ],
    as_json: JsonOption = False,
) -> None:
    """Read all checkpoints of a run and compare their files with the checksums that were saved."""
    with requires_extra("train"):
        from translution.distributed.checkpoint import run_checkpoints, verify_checkpoint
    found = run_checkpoints(run_folder)
    total_bytes = sum(ref.manifest.total_bytes for ref in found)
    with WorkProgress("verifying") as progress:
        for ref in found:
            verify_checkpoint(ref, lambda count: progress.advance(count, total_bytes))
    if as_json:
        rows = [{"checkpoint": str(ref.path), **ref.manifest.model_dump(mode="json")} for ref in found]
        print_json({"run": str(run_folder), "checkpoints": rows})
        return
    for ref in found:
        checked = "as saved" if ref.manifest.checksums else "sizes as saved; an earlier version saved no checksums"
        console().print(
            f"{ref.path}: {len(ref.manifest.files)} files, {format_bytes(ref.manifest.total_bytes)}, {checked}",
            soft_wrap=True,
        )
