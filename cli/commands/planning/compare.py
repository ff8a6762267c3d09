"""``translution compare``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from translution import planner
from translution.planner.analysis import ALPHA_RANKS
from translution.planner.common import format_bytes, format_count, format_flops

from ...completion import complete_gpu, complete_model
from ...extras import requires_extra
from ...options import JsonOption, PrecisionOption
from ...output import console, make_table, print_json
from ...progress import WorkProgress
from .. import app


@app.command(
    "compare",
    epilog="Examples: **translution compare vit-base/16** · **translution compare vit-base/16 gpt-base/1024 --gpu H200 "
    "--out table.md** · **translution compare vit-base/16 --out scaling.png**",
)
def compare_cli(
    models: Annotated[
        list[str],
        typer.Argument(metavar="MODEL...", help="Presets, or YAML/JSON files.", autocompletion=complete_model),
    ],
    gpu: Annotated[
        str, typer.Option(help="GPU of the clusters; `translution clusters` lists them.", autocompletion=complete_gpu)
    ] = "H100",
    precision: PrecisionOption = None,
    alpha_rank: Annotated[
        list[int] | None, typer.Option(help="c1 = c2 of an α-Translution; repeatable; 4 to 64 by default.")
    ] = None,
    out: Annotated[
        list[Path] | None, typer.Option(help="File to write: .md, .csv, .json, .png or .svg; repeatable.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace existing files.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Compare full Translution with α-Translution and attention: cost, memory, smallest cluster, time."""
    specs, outs = [planner.load_model(model) for model in models], out or ()
    if outs:
        with requires_extra("report"):
            from translution.reports import check_comparison_files, write_comparison
        check_comparison_files(outs, specs, force=force)
    ranks = alpha_rank or ALPHA_RANKS
    with WorkProgress("comparing") as progress:
        comparison = planner.compare(specs, gpu=gpu, precision=precision, alpha_ranks=ranks, on_progress=progress.show)
    if outs:
        write_comparison(comparison, specs, outs, force=force)
    if as_json:
        print_json(
            {
                "rows": [row.model_dump() for row in comparison.rows],
                "thresholds": [limit.model_dump() for limit in comparison.thresholds],
                "traffic": [point.model_dump() for point in comparison.traffic],
            }
        )
        return
    _print(comparison, outs)


def _cells(row: planner.ComparisonRow) -> tuple[str, ...]:
    places = [name.rpartition("x")[0] if name else "none" for name in (row.cluster, row.offload_cluster)]
    return (
        row.operator if row.alpha_rank is None else f"{row.operator} {row.alpha_rank}",
        format_count(row.parameters),
        format_flops(row.training_flops),
        format_bytes(row.states_bytes),
        format_bytes(row.saved_bytes),
        *places,
        "" if row.sample_s is None else f"{row.sample_s * 1e3:.3g} ms",
    )


def _print(comparison: planner.Comparison, outs: Sequence[Path]) -> None:
    rows, limits, to = comparison.rows, comparison.thresholds, console()
    columns = ("operator", "parameters", "train / sample", "states", "saved", "GPUs", "with offload", "time")
    for model in dict.fromkeys(row.model for row in rows):
        cells = [_cells(row) for row in rows if row.model == model]
        title = f"{model}: cost per sample, and the smallest cluster (nodes x GPUs, {comparison.gpu}) that trains it"
        to.print(make_table(title, columns, cells))
    nodes = list(dict.fromkeys(limit.nodes for limit in limits))
    lines = [
        (axis, *(str(limit.largest or "none") for limit in limits if limit.axis == axis))
        for axis in dict.fromkeys(limit.axis for limit in limits)
    ]
    title = f"{rows[0].model}: largest full Translution without offload"
    to.print(make_table(title, ("axis", *(f"{count} node{'s' if count > 1 else ''}" for count in nodes)), lines))
    if comparison.traffic:
        to.print(_traffic_table(comparison, rows[0].model))
    for path in outs:
        to.print(f"wrote {path}")


def _traffic_table(comparison: planner.Comparison, model: str) -> Table:
    """Return what ZeRO-3 and relation parallelism send, for every third number of samples."""
    points = comparison.traffic
    ranks = list(dict.fromkeys(point.ranks for point in points))
    lines = []
    for batch in list(dict.fromkeys(point.batch for point in points))[::3]:
        own = [point for point in points if point.batch == batch]
        sizes = [f"{size / 1e9:.3g}" for point in own for size in (point.zero3_bytes, point.relation_bytes)]
        lines.append((str(batch), *sizes))
    columns = ["samples per GPU"]
    for count in ranks:
        columns += [f"ZeRO-3, {count} GPUs", f"relations shared, {count} GPUs"]
    title = f"{model}: GB sent per GPU and step by ZeRO-3, and by relation parallelism"
    return make_table(title, tuple(columns), lines)
