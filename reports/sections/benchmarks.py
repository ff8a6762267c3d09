"""Sections on benchmarks: the speed of the operators and of the planner."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from translution.planner.common import InputError

from ..inputs.benchmark_records import OperatorBenchmark, PlannerBenchmark, load_record
from ..render.document import CellValue, Column, Section, SectionPart, Table


def operator_section(found: OperatorBenchmark) -> Section:
    """Compare the grouped with the gathering implementation, and α-Translution with attention.

    Args:
        found: record of ``benchmarks/operator.py``.
    """
    columns = (
        Column(title="layer"),
        Column(title="batch", kind="integer"),
        Column(title="grouped", kind="seconds"),
        Column(title="peak, grouped", kind="bytes"),
        Column(title="gathered", kind="seconds"),
        Column(title="peak, gathered", kind="bytes"),
        Column(title="time ratio", kind="times"),
        Column(title="peak ratio", kind="times"),
        Column(title="fraction of matrix product rate", kind="share"),
    )
    rows: list[tuple[CellValue, ...]] = [
        (
            row.case, row.batch, row.grouped_seconds, row.grouped_peak_bytes, row.gather_seconds, row.gather_peak_bytes,
            row.times_faster, row.times_smaller, row.matmul_rate_share,
        )
        for row in found.results
    ]  # fmt: skip
    text = f"Output and gradients of the two implementations differ by at most {found.parity:.1e} in float64."
    table = Table(
        key="operator-table",
        caption="One layer of full Translution, forward and backward, fp32, roles qkv",
        text=text,
        columns=columns,
        rows=tuple(rows),
        how="Measured by",
        made=found.made,
    )
    parts: list[SectionPart] = [table]
    if found.alpha:
        alpha = found.alpha
        titles = (("batch", "integer"), ("α-Translution", "seconds"), ("attention", "seconds"), ("time ratio", "times"))
        own = [Column.model_validate({"title": title, "kind": kind}) for title, kind in titles]
        values = alpha.batch, alpha.alpha_seconds, alpha.plain_seconds, alpha.time_ratio, alpha.operations_ratio
        parts.append(
            Table(
                key="operator-alpha",
                caption="α-Translution against attention with the same projections, forward and backward",
                columns=(Column(title="layer"), *own, Column(title="FLOP ratio", kind="times")),
                rows=(("ViT-B/16, c1 = c2 = 16", *values),),
                sortable=False,
                how="Measured by",
                made=found.made,
            )
        )
    return Section(key="operator", title="Speed of the operators", parts=tuple(parts))


def planner_section(found: PlannerBenchmark) -> Section:
    """Return the section on the time of commands and searches.

    Args:
        found: record of ``benchmarks/planner.py``.
    """
    commands = Table(
        key="planner-commands",
        caption="Time of a command, from the start to the end of its process",
        columns=(
            Column(title="command", kind="code"),
            Column(title="time", kind="seconds"),
            Column(title="allowed", kind="seconds"),
        ),
        rows=tuple((row.what, row.seconds, row.allowed) for row in found.commands),
        how="Measured by",
        made=found.made,
    )
    searches = Table(
        key="planner-searches",
        caption="Time of a search for the best plan",
        columns=(
            Column(title="search"),
            Column(title="candidates", kind="integer"),
            Column(title="time", kind="seconds"),
            Column(title="time per 5,000 candidates", kind="seconds"),
        ),
        rows=tuple(
            (row.what, row.candidates, row.seconds, row.seconds / row.candidates * 5000) for row in found.searches
        ),
        how="Measured by",
        made=found.made,
    )
    return Section(key="planner", title="Speed of the planner", parts=(commands, searches))


_READERS: dict[str, Callable[[Path], Section]] = {
    "operator.json": lambda path: operator_section(load_record(OperatorBenchmark, path)),
    "planner.json": lambda path: planner_section(load_record(PlannerBenchmark, path)),
}


def benchmark_sections(folder: Path) -> tuple[Section, ...]:
    """Return a section for each known record in a folder; other files are ignored.

    Raises:
        InputError: if the folder holds no known record, or a record is invalid.
    """
    sections = tuple(read(folder / name) for name, read in _READERS.items() if (folder / name).is_file())
    if not sections:
        raise InputError(f"--benchmarks: '{folder}' is not allowed: must be a folder with {' or '.join(_READERS)}")
    return sections
