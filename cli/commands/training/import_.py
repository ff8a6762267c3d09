"""``translution import``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from translution.planner.common import InputError, format_bytes
from translution.planner.config import OPERATOR_LABELS

from ...extras import requires_extra
from ...options import JsonOption
from ...output import console, print_json
from .. import app


def _pair(text: str, name: str) -> tuple[int, int]:
    parts = text.lower().split("x")
    if len(parts) > 2 or not all(part.isdigit() for part in parts):
        raise InputError(f"{name}: {text!r} is not allowed: must be HEIGHTxWIDTH, or one number for a square")
    return int(parts[0]), int(parts[-1])


@app.command(
    "import",
    epilog="Examples: **translution import checkpoint.pth --out base.safetensors** · "
    "**translution import weights.safetensors --revision 13730aa --heads 12 --image 224 --patch 16 "
    "--out base.safetensors**",
)
def import_cli(
    checkpoint: Annotated[
        Path, typer.Argument(help="Checkpoint of the authors' code: safetensors, or a file of torch.save.")
    ],
    out: Annotated[Path, typer.Option(help="File to write (safetensors).")],
    revision: Annotated[
        str | None,
        typer.Option(
            help="Commit of the authors' code that trained it, or old or new; required where the file does not tell."
        ),
    ] = None,
    heads: Annotated[int | None, typer.Option(help="Attention heads; required unless the file names a preset.")] = None,
    image: Annotated[str | None, typer.Option(metavar="HxW", help="Image height and width in pixels (vit).")] = None,
    patch: Annotated[str | None, typer.Option(metavar="HxW", help="Patch height and width in pixels (vit).")] = None,
    pool: Annotated[str | None, typer.Option(help="class or mean (vit).")] = None,
    name: Annotated[str | None, typer.Option(help="Name of the model in reports.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Turn a checkpoint of the authors' code into a network file of this project."""
    fields: dict[str, Any] = {"heads": heads, "pool": pool, "name": name}
    fields |= {key: _pair(text, key) for key, text in (("image", image), ("patch", patch)) if text is not None}
    with requires_extra("train"):
        from translution.distributed.checkpoint import import_published
    given = {key: value for key, value in fields.items() if value is not None}
    made = import_published(checkpoint, out, revision=revision, force=force, **given)
    if as_json:
        print_json(json.loads(made.model_dump_json()))
        return
    spec = made.spec
    label = OPERATOR_LABELS[spec.operator]
    operator = label if spec.operator == "attention" else f"{label} of {spec.roles}"
    console().print(
        f"{made.out}: {spec.family}, {operator}, width {spec.dim}, {spec.depth} layers, "
        f"{spec.heads} heads, {made.parameters:,} parameters, {format_bytes(made.file_bytes)}",
        soft_wrap=True,
    )
