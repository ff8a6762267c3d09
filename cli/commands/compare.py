"""``translution compare``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pydantic import TypeAdapter

from translution.planner.analysis.compare import ComparisonRow, ScalePoint, Threshold, compare, scale, thresholds
from translution.planner.common.errors import InputError, MissingPackageError
from translution.planner.common.files import write_bytes, write_text
from translution.planner.common.schema import validate
from translution.planner.common.units import format_bytes, format_count, format_flops
from translution.planner.config.model import ModelSpec
from translution.planner.config.training import TrainingSpec

from ..output import console, print_json, table

_TRAINING: TypeAdapter[TrainingSpec] = TypeAdapter(TrainingSpec)
FORMATS = (".md", ".csv", ".json", ".png", ".svg")


def _write(
    out: Path, rows: Sequence[ComparisonRow], limits: Sequence[Threshold], points: Sequence[Sequence[ScalePoint]]
) -> None:
    """Write what the suffix says: tables as Markdown, CSV or JSON, pictures as PNG or SVG."""
    try:
        from translution.reports.render.vega import png, svg
        from translution.reports.sections.comparison import comparison_frame, comparison_markdown, comparison_picture
    except ModuleNotFoundError as error:
        raise MissingPackageError(f"{error.name} is missing: pip install 'translution-scale[report]'") from None
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


def run_compare(
    specs: Sequence[ModelSpec],
    gpu: str,
    precision: str,
    alpha_ranks: Sequence[int],
    outs: Sequence[Path],
    *,
    as_json: bool,
) -> None:
    """Print and write what full Translution, its low-rank form and attention cost.

    Args:
        specs: the models.
        gpu: of which the clusters are.
        precision: of training.
        alpha_ranks: c1 = c2 of the low-rank rows.
        outs: files to write, by suffix.
        as_json: print JSON instead of tables.
    """
    for out in outs:
        if out.suffix not in FORMATS:
            raise InputError(f"out: {str(out)!r} is not allowed: must end in {', '.join(FORMATS)}")
    training = validate(_TRAINING, {"precision": precision, "data": "synthetic"}, "compare", ())
    rows = [row for spec in specs for row in compare(spec, gpu, training, alpha_ranks)]
    limits = [limit for spec in specs[:1] for limit in thresholds(spec, gpu, training)]
    pictures = any(out.suffix in (".png", ".svg") for out in outs)
    points = [list(scale(spec, training)) for spec in specs] if pictures else []
    for out in outs:
        _write(out, rows, limits, points)
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
        out_console.print(table(title, columns, cells))
    nodes = list(dict.fromkeys(limit.nodes for limit in limits))
    lines = [
        (axis, *(str(limit.largest or "none") for limit in limits if limit.axis == axis))
        for axis in dict.fromkeys(limit.axis for limit in limits)
    ]
    title = f"{rows[0].model}: full Translution goes up to, without offload"
    out_console.print(table(title, ("axis", *(f"{count} node(s)" for count in nodes)), lines))
    for out in outs:
        out_console.print(f"wrote {out}")
