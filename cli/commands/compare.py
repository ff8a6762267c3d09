"""``translution compare``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from pydantic import TypeAdapter

from translution.planner.analysis.compare import (
    ALPHA_RANKS,
    ComparisonRow,
    ScalePoint,
    Threshold,
    compare,
    scale,
    thresholds,
)
from translution.planner.common.errors import InputError
from translution.planner.common.files import write_bytes, write_text
from translution.planner.common.schema import validate
from translution.planner.common.units import format_bytes, format_count, format_flops
from translution.planner.config.loading import load_model
from translution.planner.config.training import TrainingSpec

from ..extras import requires_extra
from ..options import JsonOption
from ..output import console, make_table, print_json
from . import app

_TRAINING: TypeAdapter[TrainingSpec] = TypeAdapter(TrainingSpec)
FORMATS = (".md", ".csv", ".json", ".png", ".svg")


def _write(
    out: Path, rows: Sequence[ComparisonRow], limits: Sequence[Threshold], points: Sequence[Sequence[ScalePoint]]
) -> None:
    """Write what the suffix says: tables as Markdown, CSV or JSON, pictures as PNG or SVG."""
    with requires_extra("report"):
        from translution.reports.render.vega import png, svg
        from translution.reports.sections.comparison import comparison_frame, comparison_markdown, comparison_picture
    if out.suffix == ".md":
        write_text(out, comparison_markdown(rows, limits))
    elif out.suffix == ".csv":
        write_text(out, comparison_frame(rows).to_csv(index=False))
    elif out.suffix == ".json":
        write_text(out, comparison_frame(rows).to_json(orient="records", indent=2) + "\n")
    else:
        if len(points) != 1:
            raise InputError(f"out: {str(out)!r} is not allowed: a picture is of one model, not {len(points)}")
        spec = comparison_picture(points[0], limits, f"{rows[0].model}: memory over all ranks")
        write_bytes(out, png(spec)) if out.suffix == ".png" else write_text(out, svg(spec))


@app.command(
    "compare",
    epilog="Examples: **translution compare vit-base/16** · **translution compare vit-base/16 gpt-base/1024 --gpu H200 "
    "--out table.md** · **translution compare vit-base/16 --out scaling.png**",
)
def compare_cli(
    models: Annotated[list[str], typer.Argument(metavar="MODEL...", help="Presets, or YAML/JSON files.")],
    gpu: Annotated[str, typer.Option(help="GPU of the clusters; `translution clusters` lists them.")] = "H100",
    precision: Annotated[str, typer.Option(help="fp32, bf16 or fp16.")] = "bf16",
    alpha_rank: Annotated[
        list[int] | None, typer.Option(help="c1 = c2 of an α-Translution; repeatable; 4 to 64 by default.")
    ] = None,
    out: Annotated[
        list[Path] | None, typer.Option(help="File to write: .md, .csv, .json, .png or .svg; repeatable.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Compare full Translution with α-Translution and attention: cost, memory, smallest cluster, time."""
    specs = [load_model(model) for model in models]
    alpha_ranks, outs = alpha_rank or ALPHA_RANKS, out or ()
    for path in outs:
        if path.suffix not in FORMATS:
            raise InputError(f"out: {str(path)!r} is not allowed: must end in {', '.join(FORMATS)}")
    training = validate(_TRAINING, {"precision": precision, "data": "synthetic"}, "compare", ())
    rows = [row for spec in specs for row in compare(spec, gpu, training, alpha_ranks)]
    limits = [limit for spec in specs[:1] for limit in thresholds(spec, gpu, training)]
    pictures = any(path.suffix in (".png", ".svg") for path in outs)
    points = [list(scale(spec, training)) for spec in specs] if pictures else []
    for path in outs:
        _write(path, rows, limits, points)
    if as_json:
        print_json({"rows": [row.model_dump() for row in rows], "thresholds": [limit.model_dump() for limit in limits]})
        return
    _print(rows, limits, gpu, outs)


def _cells(row: ComparisonRow) -> tuple[str, ...]:
    names = {"full Translution": "full", "α-Translution": f"α {row.alpha_rank}"}
    places = [name.rpartition("x")[0] if name else "none" for name in (row.cluster, row.offload_cluster)]
    return (
        names.get(row.operator, row.operator),
        format_count(row.parameters),
        format_flops(row.training_flops),
        format_bytes(row.states_bytes),
        format_bytes(row.saved_bytes),
        *places,
        "" if row.sample_s is None else f"{row.sample_s * 1e3:.3g} ms",
    )


def _print(rows: Sequence[ComparisonRow], limits: Sequence[Threshold], gpu: str, outs: Sequence[Path]) -> None:
    out_console = console()
    columns = ("operator", "parameters", "train / sample", "states", "kept", "smallest", "offloaded", "a sample")
    for model in dict.fromkeys(row.model for row in rows):
        cells = [_cells(row) for row in rows if row.model == model]
        title = f"{model}: cost of a sample, and the smallest cluster (nodes x GPUs of {gpu}) that trains it"
        out_console.print(make_table(title, columns, cells))
    nodes = list(dict.fromkeys(limit.nodes for limit in limits))
    lines = [
        (axis, *(str(limit.largest or "none") for limit in limits if limit.axis == axis))
        for axis in dict.fromkeys(limit.axis for limit in limits)
    ]
    title = f"{rows[0].model}: full Translution goes up to, without offload"
    out_console.print(make_table(title, ("axis", *(f"{count} node(s)" for count in nodes)), lines))
    for out in outs:
        out_console.print(f"wrote {out}")
