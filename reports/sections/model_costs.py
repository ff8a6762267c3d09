"""Sections on models: the overview of their best plans, and the costs of each operator."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import altair as alt

from translution.planner.analysis import OPERATOR_LABELS, PlanPoint, best_points, operator_costs, with_operator
from translution.planner.common import GIB, Provenance, format_bytes, format_count
from translution.planner.config import OPERATORS, ModelSpec, TrainingSpec
from translution.planner.costs import TABLES
from translution.planner.hardware import ClusterSpec
from translution.planner.simulator.network import DtypeSizes

from ..charts.memory_timeline import CHART_WIDTH
from ..render.document import CellValue, Column, Picture, Section, Table, format_value
from ..render.vega import COLOURS

_GLANCE_WIDTH, _GLANCE_ROW = 440, 30
_FULL, _PLAIN = "full Translution", "attention"
_STEP, _PLAN = Column(title="step (interval)", kind="seconds"), Column(title="best plan", kind="sentence")
_DEVICE = Column(title="device memory of a rank", kind="bytes")
TIER_COLUMNS = (
    _DEVICE,
    Column(title="pageable host", kind="bytes"),
    Column(title="pinned host", kind="bytes"),
    _STEP,
    Column(title="time / sample", kind="seconds"),
    _PLAN,
)


def _time(point: PlanPoint) -> CellValue:
    if point.likely_s is None or point.low_s is None or point.high_s is None:
        return None
    return point.likely_s, point.low_s, point.high_s


def _plan(point: PlanPoint) -> str:
    return point.plan if point.plan is not None else f"nothing fits: {point.reason}"


def _host(point: PlanPoint) -> int | None:
    return None if point.host_bytes is None or point.pinned_bytes is None else point.host_bytes + point.pinned_bytes


def tier_cells(point: PlanPoint) -> tuple[CellValue, ...]:
    """Return the cells of a point in the order of `TIER_COLUMNS`."""
    sample = None if point.likely_s is None else point.likely_s / point.samples
    return (point.device_bytes, point.host_bytes, point.pinned_bytes, _time(point), sample, _plan(point))


def _sentences(points: Sequence[PlanPoint], cluster: ClusterSpec) -> tuple[str, ...]:
    """Return sentences on the first model: its size, the memory of a rank, and the time of a step."""
    model = points[0].model
    own = {point.operator: point for point in points if point.model == model}
    full, plain = own[_FULL], own[_PLAIN]
    times = full.parameters / plain.parameters
    texts = [
        f"{model} with full Translution has {format_count(full.parameters)} parameters, "
        f"{format_value(times, 'times')} as many as with attention ({format_count(plain.parameters)})."
    ]
    host = _host(full)
    if full.device_bytes is None or host is None:
        return (*texts, f"No plan fits on {cluster.name}: {full.reason}.")
    texts.append(
        f"On {cluster.name} its best plan ({full.plan}) uses at most {format_bytes(full.device_bytes)} of the "
        f"{format_bytes(cluster.device_memory_bytes)} on each device, and {format_bytes(host)} of host memory per "
        "rank, from init to resume."
    )
    attention = "" if plain.likely_s is None else f"; attention takes {format_value(plain.likely_s, 'seconds')}"
    texts.append(
        f"A step of {full.samples} samples is predicted to take {format_value(_time(full), 'seconds')}{attention}."
    )
    return tuple(texts)


def _glance_chart(
    points: Sequence[PlanPoint], values: list[dict[str, Any]], title: str, more: Sequence[alt.Chart]
) -> alt.LayerChart:
    """Return a chart with a dot for each model and operator, or a cross where no plan fits.

    Args:
        points: best plans.
        values: a row for each that fits: "model", "operator", "x", "low" and "high" on the axis, and "text".
        title: title of the axis.
        more: further layers.
    """
    operators = list(dict.fromkeys(point.operator for point in points))
    models = list(dict.fromkeys(point.model for point in points))
    colour = alt.Color(
        "operator:N",
        title=None,
        scale=alt.Scale(domain=operators, range=list(COLOURS[: len(operators)])),
        legend=alt.Legend(orient="top", columns=3, symbolOpacity=1),
    )
    y = alt.Y("model:N", title=None, scale=alt.Scale(domain=models), axis=alt.Axis(labelLimit=0, grid=True))
    scale, axis = alt.Scale(type="log"), alt.Axis(format="~g", tickCount=4)
    tooltip = ["model:N", "operator:N", alt.Tooltip("text:N", title=title), alt.Tooltip("plan:N")]
    base = alt.Chart(alt.InlineData(values=values)).encode(y=y, color=colour)
    x, low = (alt.X(f"{name}:Q", title=title, scale=scale, axis=axis) for name in ("x", "low"))
    lines = base.mark_rule(strokeWidth=2, opacity=0.5).encode(x=low, x2="high:Q")
    dots = base.mark_point(filled=True, size=80, opacity=1).encode(x=x, tooltip=tooltip)
    missing = [
        {"model": point.model, "operator": point.operator, "plan": _plan(point)} for point in points if not point.plan
    ]
    crosses = alt.Chart(alt.InlineData(values=missing)).mark_point(
        shape="cross", angle=45, filled=True, size=110, opacity=1
    )
    marks = [crosses.encode(x=alt.value(8), y=y, color=colour, tooltip=["model:N", "operator:N", "plan:N"])]
    return alt.LayerChart(
        layer=[lines, dots, *(marks if missing else []), *more],
        width=_GLANCE_WIDTH,
        height=_GLANCE_ROW * max(3, len(models)),
    )


def _glance_pictures(points: Sequence[PlanPoint], cluster: ClusterSpec, made: Provenance) -> Iterator[Picture]:
    """Yield the pictures of the memory of a rank against the capacity, and of the time of a step."""
    memory = [
        {"model": p.model, "operator": p.operator, "x": p.device_bytes / GIB, "low": p.device_bytes / GIB}
        | {"high": p.device_bytes / GIB, "text": format_bytes(p.device_bytes), "plan": _plan(p)}
        for p in points
        if p.device_bytes is not None
    ]
    times = [
        {"model": p.model, "operator": p.operator, "x": p.likely_s, "low": p.low_s, "high": p.high_s}
        | {"text": format_value(_time(p), "seconds"), "plan": _plan(p)}
        for p in points
        if p.likely_s is not None
    ]
    size = cluster.device_memory_bytes
    capacity = alt.Chart(alt.InlineData(values=[{"x": size / GIB, "text": f"capacity {format_bytes(size)}"}]))
    rule = capacity.mark_rule(strokeDash=[6, 4]).encode(x="x:Q")
    name = capacity.mark_text(align="right", baseline="bottom", dx=-4, dy=-2).encode(
        x="x:Q", y=alt.value(0), text="text:N"
    )
    cross = " A cross: no plan fits." if any(point.plan is None for point in points) else ""
    charts = {
        "Device memory of a rank": (memory, "GiB, peak", [rule, name], f"On {cluster.name}.{cross}"),
        "Time of a step": (times, "seconds per step", [], f"{points[0].samples} samples, with the interval.{cross}"),
    }
    for number, (title, (values, axis, more, caption)) in enumerate(charts.items()):
        if not values:
            continue
        chart = _glance_chart(points, values, axis, more)
        text = "; ".join(f"{row['model']} with {row['operator']} {row['text']}" for row in values)
        spec = chart.properties(title=title, description=f"{title} of the best plan on {cluster.name}: {text}.")
        key = f"glance-{number}"
        yield Picture(key=key, caption=caption, name=title, spec=dict(spec.to_dict()), half=True, made=made)


def overview_section(
    specs: Iterable[ModelSpec], cluster: ClusterSpec, training: TrainingSpec, made: Provenance
) -> Section:
    """Return the section with the best plan of every model and operator on a cluster.

    Args:
        specs: models; their operator is replaced.
        cluster: cluster, all of whose nodes are used.
        training: precision and optimizer.
        made: provenance of the values.

    Raises:
        InputError: if the cluster lacks a rate.
    """
    points = [point for spec in specs for point in best_points(spec, cluster, training)]
    rows = tuple((p.model, p.operator, p.parameters, p.device_bytes, _host(p), _time(p), _plan(p)) for p in points)
    samples = points[0].samples
    table = Table(
        key="glance-table",
        caption=f"Best plan on {cluster.name} in {training.precision}: peak memory of a rank, and time of a step of "
        f"{samples} samples",
        columns=(
            Column(title="model"),
            Column(title="operator"),
            Column(title="parameters", kind="count"),
            _DEVICE,
            Column(title="host memory of a rank", kind="bytes"),
            _STEP,
            _PLAN,
        ),
        rows=rows,
        chosen_by=0,
        text="Memory is predicted by replaying every allocation. A plan leaves 8% of each memory free, and "
        "α-Translution has c1 = c2 = 16. Times on GPUs are not measured: they are estimated as fractions of the "
        "vendors' peak rates, with an interval.",
        made=made,
    )
    pictures = _glance_pictures(points, cluster, made)
    text = " ".join(_sentences(points, cluster))
    return Section(key="glance", title="At a glance", text=(text,), parts=(*pictures, table))


_COLUMNS = (
    Column(title="model"),
    Column(title="operator"),
    Column(title="parameters", kind="count"),
    Column(title="in tables", kind="share"),
    Column(title="state (AdamW, fp32)", kind="bytes"),
    Column(title="saved, published code", kind="bytes"),
    Column(title="saved, this toolkit", kind="bytes"),
    Column(title="saved, ratio", kind="times"),
    Column(title="forward", kind="flops"),
    Column(title="training", kind="flops"),
)


def _cost_row(spec: ModelSpec, training: TrainingSpec) -> tuple[CellValue, ...]:
    costs = operator_costs(spec, 1, DtypeSizes.of_training(training, "cuda"))
    parameters, saved, flops = costs.parameters, costs.activations, costs.flops
    total = parameters.total
    return (
        spec.name,
        OPERATOR_LABELS[spec.operator],
        total,
        parameters.components.get(TABLES, 0) / total,
        costs.training_state_bytes,
        saved.published,
        saved.ours,
        saved.published / saved.ours,
        flops.forward,
        flops.training_step,
    )


def _saved_picture(rows: Iterable[tuple[CellValue, ...]], made: Provenance) -> Picture:
    """Return the chart of activations that full Translution saves for backward, in the published code and here."""
    names = [column.title for column in _COLUMNS]
    full: list[dict[str, Any]] = [
        dict(zip(names, row, strict=True)) for row in rows if row[1] == OPERATOR_LABELS["translution"]
    ]
    labels = {"saved, published code": "published code", "saved, this toolkit": "this toolkit"}
    values = [
        {"model": row["model"], "code": label, "GiB": row[name] / GIB, "text": format_bytes(row[name])}
        for row in full
        for name, label in labels.items()
    ]
    base = alt.Chart(alt.InlineData(values=values)).encode(
        y=alt.Y("model:N", title=None, sort=None, axis=alt.Axis(labelLimit=0))
    )
    axis = alt.Axis(format="~g", tickCount=8)
    x = alt.X("GiB:Q", title="saved for backward per sample, GiB", scale=alt.Scale(type="log"), axis=axis)
    colour = alt.Color("code:N", title=None, scale=alt.Scale(range=list(COLOURS[:2])), legend=alt.Legend(orient="top"))
    tooltip = ["model:N", "code:N", alt.Tooltip("text:N", title="saved")]
    line = base.mark_line(color="#8a8f98").encode(x=x, detail="model:N")
    dots = base.mark_point(filled=True, size=90, opacity=1).encode(x=x, color=colour, tooltip=tooltip)
    text = "; ".join(
        f"{row['model']} {format_bytes(row['saved, published code'])} and {format_bytes(row['saved, this toolkit'])}"
        for row in full
    )
    chart = alt.LayerChart(
        layer=[line, dots],
        width=CHART_WIDTH,
        height=26 * max(2, len(full)),
        title="Activations that full Translution saves for backward",
        description="Activations that full Translution saves for backward per sample, in the published code and in "
        f"this toolkit: {text}.",
    )
    return Picture(
        key="saved",
        caption="Activations saved for backward per sample of full Translution, in the published code and in this "
        "toolkit.",
        name="Saved activations",
        spec=dict(chart.to_dict()),
        made=made,
    )


def costs_section(specs: Iterable[ModelSpec], training: TrainingSpec, made: Provenance) -> Section:
    """Return the section with the costs of every model with every operator that suits it.

    Args:
        specs: models.
        training: training setup; its precision determines the saved bytes.
        made: provenance of the values.
    """
    found = [other for spec in specs for name in OPERATORS if (other := with_operator(spec, name))]
    rows = tuple(_cost_row(spec, training) for spec in found)
    table = Table(
        key="costs-table",
        caption=f"Costs of a model and of one sample in {training.precision}; saved: activations saved for backward",
        columns=_COLUMNS,
        rows=rows,
        chosen_by=0,
        made=made,
    )
    text = (
        "Parameters and operations are exact. The published code gathers a matrix for every pair of tokens; this "
        "toolkit does not, and recomputes the rows of a relation in backward."
    )
    return Section(key="costs", title="Costs of the models", text=(text,), parts=(table, _saved_picture(rows, made)))
