"""``translution export``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from translution.planner.common import InputError, format_bytes

from ...extras import requires_extra
from ...options import JsonOption
from ...output import console, print_json
from .. import app

if TYPE_CHECKING:
    from translution.distributed.checkpoint import ExportedFile, WrittenNetwork


@app.command(
    "export",
    epilog="Examples: **translution export plans/small/runs/001 --out small.safetensors** · "
    "**translution export plans/small/runs/001 --out small.safetensors --dtype bf16** · "
    "**translution export plans/small/runs/001 --published --out small.pth**",
)
def export_cli(
    run_folder: Annotated[
        Path,
        typer.Argument(
            metavar="RUN_FOLDER",
            help="Run folder, or plan folder with runs, whose newest checkpoint is exported; with --published also a "
            "network file.",
        ),
    ],
    out: Annotated[Path, typer.Option(help="File to write (safetensors).")],
    dtype: Annotated[str, typer.Option(help="fp32 or bf16.")] = "fp32",
    best: Annotated[
        bool, typer.Option("--best", help="Take the checkpoint with the best evaluation instead of the newest one.")
    ] = False,
    published: Annotated[
        bool, typer.Option("--published", help="Write a state dict for the authors' present code, in fp32.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Write the network of a run as one file with full tables, for inference in one process."""
    with requires_extra("train"):
        from translution.distributed.checkpoint import export, export_published
    made: ExportedFile | WrittenNetwork
    if published:
        if dtype != "fp32":
            raise InputError(f"dtype: {dtype!r} is not allowed: must be fp32 with --published")
        made = export_published(run_folder, out, best=best, force=force)
        kind, origin = "fp32 under the authors' keys", str(made.source)
    else:
        made = export(run_folder, out, dtype=dtype, best=best, force=force)  # type: ignore[arg-type]  # export checks it
        kind, origin = made.dtype, f"step {made.step} of {made.run}"
    if as_json:
        print_json(json.loads(made.model_dump_json()))
        return
    console().print(
        f"{made.out}: {made.tensors} tensors, {made.parameters:,} parameters in {kind}, "
        f"{format_bytes(made.file_bytes)}, from {origin}",
        soft_wrap=True,
    )
