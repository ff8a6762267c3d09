"""``translution prepare``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from translution.distributed.data import prepare_tokens

from ...options import JsonOption
from ...output import console, print_json
from .. import app


@app.command(
    "prepare",
    epilog="Examples: **translution prepare book.txt --out data/book** · **translution prepare a.txt b.txt --tokenizer "
    "tokenizer.json --held-out 0.05 --out data/both**",
)
def prepare_cli(
    texts: Annotated[list[Path], typer.Argument(metavar="TEXT...", help="Text files.")],
    out: Annotated[Path, typer.Option(help="Folder to write; plans take it as --train data_path=FOLDER.")],
    tokenizer: Annotated[
        Path | None,
        typer.Option(help="A tokenizer.json of Hugging Face's tokenizers; by default every byte is a token."),
    ] = None,
    held_out: Annotated[float, typer.Option(help="Fraction of each text, at its end, for evaluation.")] = 0.1,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing folder of tokens.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Tokenize text files for training a gpt model."""
    meta = prepare_tokens(texts, out, tokenizer=tokenizer, held_out=held_out, force=force)
    if as_json:
        print_json({"folder": str(out), **meta.model_dump()})
        return
    made = "bytes" if tokenizer is None else f"tokens of {tokenizer}"
    console().print(
        f"wrote {out}: {meta.training_tokens:,} tokens to train on, {meta.held_out_tokens:,} held out, {meta.dtype}, "
        f"vocabulary {meta.vocabulary:,} ({made}); plan with them: translution plan MODEL --data tokens "
        f"--train data_path={out}",
        soft_wrap=True,
    )
