"""``translution prepare``."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from translution.distributed.data import is_archive, prepare_images, prepare_tokens
from translution.planner.common import InputError

from ...options import JsonOption
from ...output import console, print_json
from ...progress import WorkProgress
from .. import app


@app.command(
    "prepare",
    epilog="Examples: **translution prepare book.txt --out data/book** · **translution prepare pages.jsonl --tokenizer "
    "tokenizer.json --held-out 0.0005 --out data/pages** · **translution prepare ILSVRC2012_img_train.tar "
    "ILSVRC2012_img_val.tar --labels ILSVRC2012_devkit_t12.tar.gz --out data/imagenet**",
)
def prepare_cli(
    sources: Annotated[
        list[Path],
        typer.Argument(
            metavar="SOURCE...",
            help="Text files; documents in JSON-lines or Parquet files or a folder of datasets; ImageNet's archives.",
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder to write; plans take it as --train data_path=FOLDER.")],
    tokenizer: Annotated[
        Path | None,
        typer.Option(help="A tokenizer.json of Hugging Face's tokenizers; by default every byte is a token."),
    ] = None,
    held_out: Annotated[
        float | None,
        typer.Option(
            help="Fraction for evaluation: of each text, at its end, or of all documents.", show_default="0.1"
        ),
    ] = None,
    labels: Annotated[
        Path | None,
        typer.Option(
            help="Classes of ImageNet's held-out images: its development kit, or a text with IMAGE CLASS in every line."
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing folder of the same kind.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Make training data: tokens from texts for gpt models, or image folders from archives for vit models."""
    archives = [path for path in sources if is_archive(path)]
    if archives and len(archives) < len(sources):
        other = next(path for path in sources if path not in archives)
        raise InputError(f"{other}: is not allowed: must be a tar archive, like {archives[0]}")
    unused = {"tokenizer": tokenizer, "held-out": held_out} if archives else {"labels": labels}
    for name, value in unused.items():
        if value is not None:
            kind = "archives" if archives else "texts"
            raise InputError(f"{name}: {str(value)!r} is not allowed: must be left out with {kind}")
    if archives:
        _prepare_images(archives, out, labels, force=force, as_json=as_json)
    else:
        share = 0.1 if held_out is None else held_out
        _prepare_tokens(sources, out, tokenizer, share, force=force, as_json=as_json)


def _prepare_images(archives: list[Path], out: Path, labels: Path | None, *, force: bool, as_json: bool) -> None:
    total_bytes = sum(path.stat().st_size for path in archives if path.is_file())
    with WorkProgress("unpacking") as progress:
        made = prepare_images(
            archives, out, labels=labels, force=force, on_image=lambda count: progress.advance(count, total_bytes)
        )
    if as_json:
        print_json({"folder": str(out), **made.model_dump()})
        return
    console().print(
        f"wrote {out}: {made.training_images:,} images to train on, {made.held_out_images:,} held out, "
        f"{made.classes:,} classes; plan with them: translution plan MODEL --data images "
        f"--train {shlex.quote(f'data_path={out}')}",
        soft_wrap=True,
    )


def _prepare_tokens(
    texts: list[Path], out: Path, tokenizer: Path | None, held_out: float, *, force: bool, as_json: bool
) -> None:
    meta = prepare_tokens(texts, out, tokenizer=tokenizer, held_out=held_out, force=force)
    if as_json:
        print_json({"folder": str(out), **meta.model_dump()})
        return
    made = "bytes" if tokenizer is None else f"tokens of {tokenizer}"
    console().print(
        f"wrote {out}: {meta.training_tokens:,} tokens to train on, {meta.held_out_tokens:,} held out, {meta.dtype}, "
        f"vocabulary {meta.vocabulary:,} ({made}); plan with them: translution plan MODEL --data tokens "
        f"--train {shlex.quote(f'data_path={out}')}",
        soft_wrap=True,
    )
