"""Sections on models alone and on their best plans: the overview, and what each operator costs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import altair as alt

from translution.planner.analysis.operator_costs import LABELS, describe, with_operator
from translution.planner.analysis.scaling import PlanPoint, best_points
from translution.planner.common.provenance import Provenance
from translution.planner.common.units import GIB, format_bytes, format_count
from translution.planner.config.model import OPERATORS, ModelSpec
from translution.planner.config.training import TrainingSpec
from translution.planner.costs.parameters import TABLES
from translution.planner.hardware.cluster import ClusterSpec
from translution.planner.simulator.network.ops import DtypeSizes

from ..render.document import CellValue, Column, Picture, Section, Table, format_value
from ..render.vega import COLOURS
from .memory_timeline import CHART_WIDTH

_FULL, _PLAIN = "full Translution", "attention"
_STEP, _PLAN = Column(title="step (interval)", kind="seconds"), Column(title="best plan", kind="sentence")
_DEVICE = Column(title="device of a rank", kind="bytes")
TIER_COLUMNS = (
    _DEVICE,
    Column(title="pageable host", kind="bytes"),
    Column(title="pinned host", kind="bytes"),
    _STEP,
    Column(title="a sample", kind="seconds"),
    _PLAN,
)


def _time(point: PlanPoint) -> CellValue:
    if point.likely_s is None or point.low_s is None or point.high_s is None:
        return None
    return point.likely_s, point.low_s, point.high_s


def _plan(point: PlanPoint) -> str:
    return point.plan if point.plan is not None else f"nothing fits; {point.reason}"


def _host(point: PlanPoint) -> int | None:
    return None if point.host_bytes is None or point.pinned_bytes is None else point.host_bytes + point.pinned_bytes


def tier_cells(point: PlanPoint) -> tuple[CellValue, ...]:
    """Values in the order of `TIER_COLUMNS`."""
    sample = None if point.likely_s is None else point.likely_s / point.samples
    return (point.device_bytes, point.host_bytes, point.pinned_bytes, _time(point), sample, _plan(point))


def _sentences(points: Sequence[PlanPoint], cluster: ClusterSpec) -> tuple[str, ...]:
    """How large the first model is, what a rank holds of it, and how long it takes."""
    model = points[0].model
    own = {point.operator: point for point in points if point.model == model}
    full, plain = own[_FULL], own[_PLAIN]
    times = full.parameters / plain.parameters
    texts = [
        f"{model} with full Translution has {format_count(full.parameters)} parameters, {format_value(times, 'times')} as "
        f"many as with attention ({format_count(plain.parameters)})."
    ]
    host = _host(full)
    if full.device_bytes is None or host is None:
        return (*texts, f"No plan of it fits on {cluster.name}: {full.reason}.")
    texts.append(
        f"On {cluster.name} its best plan ({full.plan}) holds at most {format_bytes(full.device_bytes)} of each "
        f"rank's {format_bytes(cluster.device_memory_bytes)}, and {format_bytes(host)} of host memory for each "
        "rank, from init to resume."
    )
    beside = "" if plain.likely_s is None else f"; attention takes {format_value(plain.likely_s, 'seconds')}"
    texts.append(
        f"A step of {full.samples} samples is predicted to take {format_value(_time(full), 'seconds')}{beside}."
    )
    return tuple(texts)


def overview_section(
    specs: Iterable[ModelSpec], cluster: ClusterSpec, training: TrainingSpec, made: Provenance
) -> Section:
    """The best plan of every model and operator on one cluster, and three sentences on the first.

    Args:
        specs: the models; their operator is replaced.
        cluster: whose nodes are all used.
        training: precision and optimizer.
        made: where the figures come from.

    Raises:
        InputError: if the cluster lacks a rate.
    """
    points = [point for spec in specs for point in best_points(spec, cluster, training)]
    rows = tuple((p.model, p.operator, p.parameters, p.device_bytes, _host(p), _time(p), _plan(p)) for p in points)
    samples = points[0].samples
    table = Table(
        key="glance-table",
        caption=f"The best plan on {cluster.name} in {training.precision}: the highest memory of a rank, and the time "
        f"of a step of {samples} samples",
        columns=(
            Column(title="model"),
            Column(title="operator"),
            Column(title="parameters", kind="count"),
            _DEVICE,
            Column(title="host of a rank", kind="bytes"),
            _STEP,
            _PLAN,
        ),
        rows=rows,
        chosen_by=0,
        made=made,
    )
    note = (
        "Memory is replayed allocation by allocation; 8% of each stays free, and α-Translution has c1 = c2 = 16. Times "
        "on GPUs are unmeasured: shares of the vendors' peaks, with an interval."
    )
    return Section(key="glance", title="At a glance", text=(*_sentences(points, cluster), note), parts=(table,))


_COLUMNS = (
    Column(title="model"),
    Column(title="operator"),
    Column(title="parameters", kind="count"),
    Column(title="in tables", kind="share"),
    Column(title="state (AdamW, fp32)", kind="bytes"),
    Column(title="kept, published", kind="bytes"),
    Column(title="kept, ours", kind="bytes"),
    Column(title="published / ours", kind="times"),
    Column(title="forward", kind="flops"),
    Column(title="training", kind="flops"),
)


def _cost_row(spec: ModelSpec, training: TrainingSpec) -> tuple[CellValue, ...]:
    entry = describe(spec, 1, DtypeSizes.of(training.dtype_bytes, "cuda"))
    parameters, kept, flops = entry["parameters"], entry["activations_bytes"], entry["flops_per_sample"]
    total = parameters["total"]
    return (
        spec.name,
        LABELS[spec.operator],
        total,
        parameters["components"].get(TABLES, 0) / total,
        entry["training_state_bytes"],
        kept["published"],
        kept["ours"],
        kept["published"] / kept["ours"],
        flops["forward"],
        flops["training_step"],
    )


def _kept_picture(rows: Iterable[tuple[CellValue, ...]], made: Provenance) -> Picture:
    """What full Translution keeps, the published way and ours."""
    names = [column.title for column in _COLUMNS]
    full: list[dict[str, Any]] = [dict(zip(names, row, strict=True)) for row in rows if row[1] == LABELS["translution"]]
    ways = {"kept, published": "published way", "kept, ours": "ours"}
    values = [
        {"model": row["model"], "way": way, "GiB": row[name] / GIB, "text": format_bytes(row[name])}
        for row in full
        for name, way in ways.items()
    ]
    base = alt.Chart(alt.InlineData(values=values)).encode(
        y=alt.Y("model:N", title=None, sort=None, axis=alt.Axis(labelLimit=0))
    )
    axis = alt.Axis(format="~g", tickCount=8)
    x = alt.X("GiB:Q", title="kept for backward by one sample, GiB", scale=alt.Scale(type="log"), axis=axis)
    colour = alt.Color("way:N", title=None, scale=alt.Scale(range=list(COLOURS[:2])), legend=alt.Legend(orient="top"))
    tooltip = ["model:N", "way:N", alt.Tooltip("text:N", title="kept")]
    line = base.mark_line(color="#8a8f98").encode(x=x, detail="model:N")
    dots = base.mark_point(filled=True, size=90, opacity=1).encode(x=x, color=colour, tooltip=tooltip)
    text = "; ".join(
        f"{row['model']} {format_bytes(row['kept, published'])}, ours {format_bytes(row['kept, ours'])}" for row in full
    )
    chart = alt.LayerChart(
        layer=[line, dots],
        width=CHART_WIDTH,
        height=26 * max(2, len(full)),
        title="What a forward pass of full Translution keeps",
        description=f"What full Translution keeps for backward of one sample, the published way: {text}.",
    )
    return Picture(
        key="kept",
        caption="Activations kept for backward by one sample of full Translution, the published way and ours.",
        name="Kept activations",
        spec=dict(chart.to_dict()),
        made=made,
    )


def costs_section(specs: Iterable[ModelSpec], training: TrainingSpec, made: Provenance) -> Section:
    """What every model costs with every operator that suits it.

    Args:
        specs: the models.
        training: its precision decides the bytes kept.
        made: where the figures come from.
    """
    found = [other for spec in specs for name in OPERATORS if (other := with_operator(spec, name))]
    rows = tuple(_cost_row(spec, training) for spec in found)
    table = Table(
        key="costs-table",
        caption=f"Costs of a model and of one sample, {training.precision}; kept: by a forward pass for backward",
        columns=_COLUMNS,
        rows=rows,
        chosen_by=0,
        made=made,
    )
    text = (
        "Parameters and operations are exact. The published way gathers a matrix for every pair of tokens; ours "
        "computes the rows of a relation again in backward."
    )
    return Section(key="costs", title="What the models cost", text=(text,), parts=(table, _kept_picture(rows, made)))
