"""Sections that compare predicted with measured memory and step times."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import altair as alt

from ..charts.memory_timeline import CHART_WIDTH
from ..inputs.benchmark_records import Accuracy, PairRow, RankRow, RehearsalRecord, StepRow, StepTimes
from ..inputs.run_accuracy import PROCESS_PREFIX, RESIDENT, SAVED
from ..render.document import CellValue, Column, Picture, Section, SectionPart, Table
from ..render.vega import COLOURS

_KINDS: dict[str, Callable[[RankRow], bool]] = {
    "states between steps": lambda row: row.what == RESIDENT,
    "peaks by phase": lambda row: row.what.startswith("peak of"),
    "saved for backward": lambda row: row.what == SAVED,
    "pinned buffers": lambda row: row.tier == "pinned",
    "files on NVMe": lambda row: row.tier == "nvme",
    "resident set": lambda row: row.what.startswith(PROCESS_PREFIX),
}
_PEAKS, _RESIDENT_SET = (1.0, 1.05), (0.9, 1.1)
"""Target ranges of predicted over measured, for peaks and resident sets."""
_STEP = 0.15
"""Target relative error of a predicted step time."""


def _span(ratios: Iterable[float | None]) -> CellValue:
    known = [ratio for ratio in ratios if ratio is not None]
    return (min(known), max(known)) if known else None


def _ratio(row: PairRow) -> float | None:
    return row.predicted / row.measured if row.measured else None


def _outside(row: RankRow) -> bool:
    """True if the row is a peak or a resident set outside its target range."""
    if row.ratio is None:
        return False
    if row.what.startswith(PROCESS_PREFIX):
        return not _RESIDENT_SET[0] <= row.ratio <= _RESIDENT_SET[1]
    return row.what.startswith("peak of") and not _PEAKS[0] <= row.ratio <= _PEAKS[1]


def _summary(accuracy: Accuracy) -> Iterator[tuple[CellValue, ...]]:
    """Yield the quantity, the number of comparisons, the range of ratios, and how many are within tolerance."""
    counts, passes, ranks = accuracy.sections.counts, accuracy.sections.passes, accuracy.sections.ranks
    if counts:
        exact = sum(row.predicted == row.measured for row in counts)
        yield "parameters of a preset and operator", len(counts), _span(map(_ratio, counts)), f"{exact} exact"
    if passes:
        ratios = [ratio for row in passes if (ratio := _ratio(row)) is not None]
        inside = sum(0.998 <= ratio <= 1.02 for ratio in ratios)
        yield "peaks of one process", len(passes), _span(ratios), f"{inside} within 0.998 to 1.02"
    for kind, belongs in _KINDS.items():
        own = [row for row in ranks if belongs(row)]
        if own:
            missed = sum(map(_outside, own))
            low, high = _RESIDENT_SET if kind == "resident set" else _PEAKS
            judged = kind in ("resident set", "peaks by phase")
            verdict = f"{len(own) - missed} within {low:.2f} to {high:.2f}" if judged else ""
            yield f"two ranks: {kind}", len(own), _span(row.ratio for row in own), verdict


def _ranks_picture(rows: Sequence[RankRow], accuracy: Accuracy) -> Picture:
    """Return the chart with every ratio of the two-rank runs as a dot."""
    values: list[dict[str, Any]] = [
        {"run": row.run, "kind": kind, "ratio": round(row.ratio, 5), "what": row.what, "rank": row.rank}
        for row in rows
        for kind, belongs in _KINDS.items()
        if belongs(row) and row.ratio is not None
    ]
    colour = alt.Color(
        "kind:N",
        title=None,
        scale=alt.Scale(domain=list(_KINDS), range=list(COLOURS[: len(_KINDS)])),
        legend=alt.Legend(orient="bottom"),
    )
    dots = (
        alt.Chart(alt.InlineData(values=values))
        .mark_point(filled=True, size=55, opacity=0.8)
        .encode(
            x=alt.X("ratio:Q", title="predicted / measured", scale=alt.Scale(zero=False)),
            y=alt.Y("run:N", title=None, sort=None, axis=alt.Axis(labelLimit=0, grid=True)),
            color=colour,
            tooltip=["run:N", "rank:Q", alt.Tooltip("what:N", title="item"), alt.Tooltip("ratio:Q", format=".4f")],
        )
    )
    rule = alt.Chart(alt.InlineData(values=[{"ratio": 1.0}])).mark_rule(strokeDash=[4, 3]).encode(x="ratio:Q")
    ratios = [row["ratio"] for row in values]
    spec = alt.LayerChart(
        layer=[rule, dots],
        width=CHART_WIDTH,
        height=24 * len({row.run for row in rows}),
        title="Predicted over measured memory of two ranks",
        description=f"Predicted over measured memory of {len(values)} items and peaks of two ranks: from "
        f"{min(ratios):.3f} to {max(ratios):.3f}.",
    ).to_dict()
    caption = "Each dot is an item, the peak of a phase, or the resident set of one rank; 1 is exact."
    return Picture(
        key="accuracy", caption=caption, name="Predicted over measured memory", spec=dict(spec), how="Measured by",
        made=accuracy.made,
    )  # fmt: skip


def _ranks_table(rows: Sequence[RankRow], accuracy: Accuracy) -> Table:
    """Return the table with the range of ratios of every run."""
    cells = []
    for run in dict.fromkeys(row.run for row in rows):
        own = [row for row in rows if row.run == run]
        cells.append((run, *(_span(row.ratio for row in own if belongs(row)) for belongs in _KINDS.values())))
    return Table(
        key="accuracy-runs",
        heading="By run",
        caption="Predicted over measured memory of two ranks, from init to resume",
        columns=(Column(title="run"), *(Column(title=kind, kind="ratio") for kind in _KINDS)),
        rows=tuple(cells),
        how="Measured by",
        made=accuracy.made,
    )


def _misses_table(rows: Sequence[RankRow], accuracy: Accuracy) -> Table | None:
    missed = [row for row in rows if _outside(row)]
    if not missed:
        return None
    titles = {"rank": "integer", "item": "text", "predicted": "bytes", "measured": "bytes"}
    columns = [Column.model_validate({"title": title, "kind": kind}) for title, kind in titles.items()]
    cells = tuple((r.run, r.rank, r.what, r.predicted_bytes, r.measured_bytes, r.ratio) for r in missed)
    return Table(
        key="accuracy-misses",
        caption=f"Peaks outside {_PEAKS[0]:.2f} to {_PEAKS[1]:.2f}, and resident sets outside {_RESIDENT_SET[0]} to "
        f"{_RESIDENT_SET[1]}",
        columns=(Column(title="run"), *columns, Column(title="predicted / measured", kind="ratio")),
        rows=cells,
        how="Measured by",
        made=accuracy.made,
    )


def _rehearsal_table(rehearsal: RehearsalRecord) -> Table:
    columns = (
        Column(title="item"),
        Column(title="predicted", kind="bytes"),
        Column(title="measured", kind="bytes"),
        Column(title="predicted / measured", kind="ratio"),
    )
    return Table(
        key="rehearsal",
        heading="One rank of a large cluster",
        caption=rehearsal.what,
        text="Computation was faked: matrix products were allocated but not computed. Memory use was real.",
        columns=columns,
        rows=tuple((row.what, row.predicted, row.measured, _ratio(row)) for row in rehearsal.rows),
        how="Measured by",
        made=rehearsal.made,
    )


def accuracy_section(accuracy: Accuracy) -> Section:
    """Return the section on predicted over measured memory: a summary, each run, and a rehearsed rank.

    Args:
        accuracy: record of ``benchmarks/accuracy.py``.
    """
    columns = (
        Column(title="quantity"),
        Column(title="comparisons", kind="integer"),
        Column(title="predicted / measured", kind="ratio"),
        Column(title="within tolerance"),
    )
    parts: list[SectionPart] = [
        Table(
            key="accuracy-summary",
            caption="Predicted over measured memory, and parameters",
            columns=columns,
            rows=tuple(_summary(accuracy)),
            how="Measured by",
            made=accuracy.made,
        )
    ]
    ranks = accuracy.sections.ranks
    if ranks:
        parts += [_ranks_picture(ranks, accuracy), _ranks_table(ranks, accuracy)]
        missed = _misses_table(ranks, accuracy)
        parts += [missed] if missed else []
    if accuracy.rehearsal:
        parts.append(_rehearsal_table(accuracy.rehearsal))
    text = ["Measured on two CPU ranks under gloo, with the counters of torch's allocator; no GPU was measured."]
    if accuracy.predicted:
        command = accuracy.predicted.replace("`", "")
        text.append(f"The measurements of two ranks are compared with newer predictions: {command}.")
    return Section(key="accuracy-section", title="Predicted and measured memory", text=tuple(text), parts=tuple(parts))


def _step_picture(rows: Sequence[StepRow], times: StepTimes) -> Picture:
    """Return the chart of the predicted interval and the measured range of each run's step time."""
    values = []
    for row in rows:
        predicted = {"which": "predicted, interval", "y": row.predicted_s, "low": row.low_s, "high": row.high_s}
        measured = {"which": "measured, range", "y": row.measured_s, "low": row.fastest_s, "high": row.slowest_s}
        values += [{"run": row.what} | predicted, {"run": row.what} | measured]
    which = list(dict.fromkeys(str(row["which"]) for row in values))
    colours = alt.Scale(domain=which, range=list(COLOURS[:2]))
    base = alt.Chart(alt.InlineData(values=values)).encode(
        y=alt.Y("run:N", title=None, sort=None, axis=alt.Axis(labelLimit=0)),
        yOffset=alt.YOffset("which:N", sort=which),
        color=alt.Color("which:N", title=None, scale=colours, legend=alt.Legend(orient="bottom")),
    )
    title, scale = "seconds per step", alt.Scale(zero=True)
    seconds = [alt.Tooltip(f"{name}:Q", format=".3f") for name in ("low", "high")]
    tooltip = ["run:N", "which:N", alt.Tooltip("y:Q", title="seconds", format=".3f"), *seconds]
    line = base.mark_rule(strokeWidth=3, opacity=0.7).encode(x=alt.X("low:Q", title=title, scale=scale), x2="high:Q")
    dots = base.mark_point(filled=True, size=70, opacity=1).encode(
        x=alt.X("y:Q", title=title, scale=scale), tooltip=tooltip
    )
    text = "; ".join(f"{row.what} predicted {row.predicted_s:.2f} s, measured {row.measured_s:.2f} s" for row in rows)
    title = "Predicted and measured step time"
    spec = alt.LayerChart(
        layer=[line, dots], width=CHART_WIDTH, height=44 * len(rows), title=title, description=f"{title}: {text}."
    ).to_dict()
    caption = "Predicted time with its interval; median of the measured steps with the fastest and the slowest."
    return Picture(key="step-time", caption=caption, name=title, spec=dict(spec), how="Measured by", made=times.made)


def step_time_section(times: StepTimes) -> Section:
    """Return the section on predicted and measured step times.

    Args:
        times: record of ``benchmarks/step_time.py``.
    """
    columns = (
        Column(title="run"),
        Column(title="predicted (interval)", kind="seconds"),
        Column(title="measured (fastest to slowest)", kind="seconds"),
        Column(title="predicted / measured", kind="ratio"),
    )
    rows: list[tuple[CellValue, ...]] = [
        (
            row.what,
            (row.predicted_s, row.low_s, row.high_s),
            (row.measured_s, row.fastest_s, row.slowest_s),
            row.predicted_s / row.measured_s,
        )
        for row in times.rows
    ]
    off = sum(abs(row.predicted_s / row.measured_s - 1) > _STEP for row in times.rows)
    text = (
        "A vision transformer of 50 tokens, width 192 and 4 layers in fp32 on a CPU, 8 samples per rank. Predictions "
        "use the rates that translution calibrate measured in the same run. "
        f"{len(rows) - off} of {len(rows)} are within {_STEP:.0%} of the measurement."
    )
    table = Table(
        key="step-time-table",
        caption="Predicted and measured step time",
        columns=columns,
        rows=tuple(rows),
        how="Measured by",
        made=times.made,
    )
    parts = (table, _step_picture(times.rows, times))
    return Section(key="step-time-section", title="Predicted and measured time", text=(text,), parts=parts)
