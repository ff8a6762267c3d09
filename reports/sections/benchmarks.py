"""Sections of what the benchmarks have recorded: speed of the operators, and of the planner."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from translution.planner.common.errors import InputError

from ..inputs.benchmark_records import OperatorBenchmark, PlannerBenchmark, load_record
from ..render.document import CellValue, Column, Section, SectionPart, Table


def operator_section(found: OperatorBenchmark) -> Section:
    """A grouped layer against the gathered way, and α-Translution against attention.

    Args:
        found: as ``benchmarks/operator.py`` has recorded it.
    """
    columns = (
        Column(title="layer"),
        Column(title="batch", kind="integer"),
        Column(title="grouped", kind="seconds"),
        Column(title="peak", kind="bytes"),
        Column(title="gathered", kind="seconds"),
        Column(title="its peak", kind="bytes"),
        Column(title="faster", kind="times"),
        Column(title="smaller", kind="times"),
        Column(title="of plain products' rate", kind="share"),
    )
    rows: list[tuple[CellValue, ...]] = [
        (
            row.case, row.batch, row.grouped_seconds, row.grouped_peak_bytes, row.gather_seconds, row.gather_peak_bytes,
            row.times_faster, row.times_smaller, row.matmul_rate_share,
        )
        for row in found.results
    ]  # fmt: skip
    text = f"Output and gradients differ from the gathered reference's by at most {found.parity:.1e} in float64."
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
        titles = (("batch", "integer"), ("α-Translution", "seconds"), ("attention", "seconds"), ("slower", "times"))
        own = [Column.model_validate({"title": title, "kind": kind}) for title, kind in titles]
        values = alpha.batch, alpha.alpha_seconds, alpha.plain_seconds, alpha.time_ratio, alpha.operations_ratio
        parts.append(
            Table(
                key="operator-alpha",
                caption="α-Translution against attention with the same projections, forward and backward",
                columns=(Column(title="layer"), *own, Column(title="more operations", kind="times")),
                rows=(("ViT-B/16, c1 = c2 = 16", *values),),
                sortable=False,
                how="Measured by",
                made=found.made,
            )
        )
    return Section(key="operator", title="Speed of the operators", parts=tuple(parts))


def planner_section(found: PlannerBenchmark) -> Section:
    """How long commands and searches take.

    Args:
        found: as ``benchmarks/planner.py`` has recorded it.
    """
    commands = Table(
        key="planner-commands",
        caption="Time of a command, whole process",
        columns=(
            Column(title="command", kind="code"),
            Column(title="seconds", kind="seconds"),
            Column(title="allowed", kind="seconds"),
        ),
        rows=tuple((row.what, row.seconds, row.allowed) for row in found.commands),
        how="Measured by",
        made=found.made,
    )
    searches = Table(
        key="planner-searches",
        caption="Time of a search",
        columns=(
            Column(title="search"),
            Column(title="candidates", kind="integer"),
            Column(title="seconds", kind="seconds"),
            Column(title="seconds for 5,000", kind="seconds"),
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
    """A section for each file of a folder that reports know; others are passed over.

    Raises:
        InputError: if it is no folder, holds none of them, or one is damaged.
    """
    sections = tuple(read(folder / name) for name, read in _READERS.items() if (folder / name).is_file())
    if not sections:
        raise InputError(f"--benchmarks: '{folder}' is not allowed: must be a folder with {' or '.join(_READERS)}")
    return sections
