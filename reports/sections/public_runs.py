"""Section that compares predicted step times with those that others have published of real GPUs."""

from __future__ import annotations

import altair as alt

from ..charts.memory_timeline import CHART_WIDTH
from ..inputs.benchmark_records import PublicRuns
from ..render.document import CellValue, Column, Picture, Section, Table
from ..render.vega import COLOURS


def _picture(found: PublicRuns) -> Picture:
    """Return the chart of predicted against published seconds, with logarithmic axes."""
    values = [
        {"run": row.run, "gpu": row.gpu, "published": row.published_s, "predicted": row.predicted_s, "low": row.low_s,
         "high": row.high_s}
        for row in found.rows
    ]  # fmt: skip
    gpus = list(dict.fromkeys(row.gpu for row in found.rows))
    ends = (
        min(min(row.published_s, row.low_s) for row in found.rows),
        max(max(row.published_s, row.high_s) for row in found.rows),
    )
    scale = alt.Scale(type="log", domain=ends, nice=False)
    colour = alt.Color(
        "gpu:N",
        title=None,
        scale=alt.Scale(domain=gpus, range=list(COLOURS[: len(gpus)])),
        legend=alt.Legend(orient="bottom"),
    )
    base = alt.Chart(alt.InlineData(values=values)).encode(
        x=alt.X("published:Q", title="published seconds per step", scale=scale), color=colour
    )
    title = "predicted seconds per step"
    seconds = [alt.Tooltip(f"{name}:Q", format=".3g") for name in ("published", "predicted", "low", "high")]
    dots = base.mark_point(filled=True, size=45, opacity=0.9).encode(
        y=alt.Y("predicted:Q", title=title, scale=scale), tooltip=["run:N", *seconds]
    )
    intervals = base.mark_rule(opacity=0.45).encode(y=alt.Y("low:Q", title=title, scale=scale), y2="high:Q")
    equal = (
        alt.Chart(alt.InlineData(values=[{"published": end, "predicted": end} for end in ends]))
        .mark_line(strokeDash=[4, 3], color="gray")
        .encode(x=alt.X("published:Q", scale=scale), y=alt.Y("predicted:Q", scale=scale))
    )
    every = found.summary["all"]
    name = "Predicted against published step time"
    spec = alt.LayerChart(
        layer=[equal, intervals, dots],
        width=CHART_WIDTH,
        height=CHART_WIDTH // 2,
        title=name,
        description=f"{name} of {every.runs} runs: the median of predicted over published is {every.median:.2f}, from "
        f"{every.lowest:.2f} to {every.highest:.2f}.",
    ).to_dict()
    caption = "Each dot is a run with its predicted interval; on the dashed line both are equal."
    return Picture(
        key="public-runs", caption=caption, name=name, spec=dict(spec), how="Predicted by", made=found.made
    )  # fmt: skip


def _fits_table(found: PublicRuns) -> Table:
    """Return the table of published micro-batches that fit or do not."""
    return Table(
        key="public-fits",
        heading="Memory",
        caption="Published micro-batches that fit or do not, and the predicted peak",
        columns=(
            Column(title="run"),
            Column(title="published"),
            Column(title="predicted peak, of a GPU's memory"),
            Column(title="source"),
        ),
        rows=tuple(
            (row.what, "fits" if row.fitted else "out of memory", f"{row.utilization:.0%}", row.source)
            for row in found.fits
        ),
        how="Predicted by",
        made=found.made,
    )


def public_section(found: PublicRuns) -> Section:
    """Return the section on published runs of attention models: a summary, a picture, single figures.

    Args:
        found: record of ``benchmarks/public_runs.py``.
    """
    ratio = "predicted / published"
    columns = (
        Column(title="GPU"),
        Column(title="runs", kind="integer"),
        Column(title=f"median of {ratio}", kind="ratio"),
        Column(title=ratio, kind="ratio"),
        Column(title="within 20%"),
        Column(title="inside the interval"),
    )
    rows: list[tuple[CellValue, ...]] = [
        (
            gpu,
            row.runs,
            row.median,
            (row.lowest, row.highest),
            f"{row.within_20_percent:.0%}",
            f"{row.inside_the_interval:.0%}",
        )
        for gpu, row in found.summary.items()
    ]
    summary = Table(
        key="public-summary",
        caption="Predicted over published step time of MPT models",
        columns=columns,
        rows=tuple(rows),
        how="Predicted by",
        made=found.made,
    )
    figures = Table(
        key="public-figures",
        heading="Single runs",
        caption="Predicted and published figures of runs with DeepSpeed",
        columns=(
            Column(title="figure"),
            Column(title="published"),
            Column(title="predicted"),
            Column(title=ratio, kind="ratio"),
            Column(title="source"),
        ),
        rows=tuple(
            (row.what, f"{row.published:g}", f"{row.predicted:.3g}", row.ratio, row.source) for row in found.figures
        ),
        how="Predicted by",
        made=found.made,
    )
    text: tuple[str, ...] = (
        "Runs that others have published of attention models on A100 and H100 (mosaicml/llm-foundry, FSDP in bf16); "
        "reports/public.md lists each. The shares of the peak that products and attention reach were chosen by these "
        "runs; everything else is computed. Nothing ran on a GPU of ours.",
    )
    every = found.summary["all"]
    if every.fitting is not None:
        text += (f"All of these runs fitted their GPUs; {every.fitting} of {every.runs} are predicted to.",)
    memory = (_fits_table(found),) if found.fits else ()
    parts: tuple[Table | Picture, ...] = (summary, _picture(found), *memory, figures)
    return Section(key="public-section", title="Predicted and published time on GPUs", text=text, parts=parts)
