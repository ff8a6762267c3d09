"""The section that sets the operators beside each other on GPUs: what ``translution compare`` gives."""

from __future__ import annotations

from collections.abc import Sequence

from translution.planner.compare import ComparisonRow, ScalePoint, Threshold
from translution.planner.provenance import Provenance

from .comparison import AXIS_TITLES, picture
from .document import Column, Part, Picture, Section, Table, Value

_COLUMNS = (
    Column(title="model"),
    Column(title="operator"),
    Column(title="c1 = c2", kind="integer"),
    Column(title="parameters", kind="count"),
    Column(title="training / sample", kind="flops"),
    Column(title="states", kind="bytes"),
    Column(title="kept / sample", kind="bytes"),
    Column(title="whole at once", kind="bytes"),
    Column(title="ranks", kind="integer"),
    Column(title="smallest cluster"),
    Column(title="with offload"),
    Column(title="time / sample", kind="seconds"),
)


def _row(row: ComparisonRow) -> tuple[Value, ...]:
    sizes = row.states_bytes, row.kept_bytes, row.floor_bytes
    places = row.ranks, row.cluster or "none", row.offload_cluster or "none"
    return (
        row.model, row.operator, row.alpha_rank, row.parameters, row.training_flops, *sizes, *places, row.sample_s,
    )  # fmt: skip


def _limits(limits: Sequence[Threshold], model: str, made: Provenance) -> Table:
    nodes = list(dict.fromkeys(limit.nodes for limit in limits))
    rows: list[tuple[Value, ...]] = []
    for axis in dict.fromkeys(limit.axis for limit in limits):
        found = {limit.nodes: limit.largest for limit in limits if limit.axis == axis}
        rows.append((AXIS_TITLES[axis], *(found.get(count) or "none" for count in nodes)))
    columns = (Column(title="full Translution up to"), *(Column(title=f"{n} node(s)", kind="integer") for n in nodes))
    caption = f"The largest {model} that so many nodes train without offload, one size at a time changed"
    return Table(key="limits-table", caption=caption, columns=columns, rows=tuple(rows), sortable=False, made=made)


def comparison(
    rows: Sequence[ComparisonRow],
    limits: Sequence[Threshold],
    points: Sequence[ScalePoint],
    gpu: str,
    made: Provenance,
) -> Section:
    """What every operator needs, the smallest cluster that trains it, and the time there.

    Args:
        rows: of all models.
        limits: of the first model; none where they were not asked for.
        points: of the first model; likewise.
        gpu: of which the clusters are.
        made: where the figures come from.
    """
    parts: list[Part] = [
        Table(
            key="comparison-table",
            caption=f"Costs, and the smallest cluster of {gpu} that trains each model",
            columns=_COLUMNS,
            rows=tuple(map(_row, rows)),
            chosen_by=0,
            made=made,
        )
    ]
    first = rows[0].model
    if points:
        spec = picture(points, limits, f"{first}: memory over all ranks")
        ends = [p for p in points if p.value == max(q.value for q in points if q.axis == p.axis)]
        most = "; ".join(f"{p.operator} {p.states_bytes:,} bytes of states at {p.value} ({p.axis})" for p in ends)
        parts.append(
            Picture(
                key="comparison",
                caption=f"States and one sample's activations of {first} over all ranks, against width, tokens and "
                "layers; rules where so many nodes no longer train full Translution.",
                name="Memory over all ranks",
                spec=spec | {"description": f"Memory over all ranks: {most}."},
                made=made,
            )
        )
    if limits:
        parts.append(_limits(limits, first, made))
    text = (
        "states: parameters, gradients, master copy and moments over all ranks; whole at once: the least that ZeRO-3 "
        "needs unsharded on every rank. Time is that of the best plan without offload on the smallest cluster, "
        "unmeasured."
    )
    return Section(key="comparison-section", title=f"Operators on {gpu}", text=(text,), parts=tuple(parts))
