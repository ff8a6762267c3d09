"""``translution prepare``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from translution.distributed.data.tokenize import prepare

from ..output import console, print_json


def run_prepare(
    texts: Sequence[Path], out: Path, tokenizer: Path | None, held_out: float, *, force: bool, as_json: bool
) -> None:
    """Make token files and say what they hold.

    Args:
        texts: text files.
        out: folder to write.
        tokenizer: a tokenizer.json, or None for bytes.
        held_out: share of each text that is held out.
        force: replace an existing folder of tokens.
        as_json: print JSON instead of a line.
    """
    meta = prepare(texts, out, tokenizer=tokenizer, held_out=held_out, force=force)
    if as_json:
        print_json({"folder": str(out), **meta.model_dump()})
        return
    made = "bytes" if tokenizer is None else f"tokens of {tokenizer}"
    console().print(
        f"wrote {out}: {meta.training_tokens:,} tokens to train on, {meta.held_out_tokens:,} held out, {meta.dtype}, "
        f"vocabulary {meta.vocabulary:,} ({made}); plan with them: translution plan MODEL --data tokens "
        f"--train data_path={out}"
    )
