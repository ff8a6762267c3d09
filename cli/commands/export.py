"""``translution export``."""

from __future__ import annotations

import json
from pathlib import Path

from translution.planner.common.errors import MissingPackageError
from translution.planner.common.units import format_bytes

from ..output import console, print_json


def run_export(run: Path, out: Path, dtype: str, *, force: bool, as_json: bool) -> None:
    """Write a run's network as one file and say what it holds.

    Args:
        run: the run folder.
        out: the file to make.
        dtype: "fp32" or "bf16".
        force: replace a file that exists.
        as_json: print JSON instead of a sentence.
    """
    try:
        from translution.distributed.checkpoint.export import export
    except ImportError as error:
        raise MissingPackageError(f"{error.name} is missing: pip install 'translution-scale[train]'") from None
    made = export(run, out, dtype=dtype, force=force)  # type: ignore[arg-type]  # export checks it
    if as_json:
        print_json(json.loads(made.model_dump_json()))
        return
    console().print(
        f"{made.out}: {made.tensors} tensors, {made.parameters:,} parameters in {made.dtype}, "
        f"{format_bytes(made.file_bytes)}, of step {made.step} of {made.run}",
        soft_wrap=True,
    )
