"""The report of a plan: memory timelines, summary, memory breakdown, and the measured memory of a run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from translution.planner.common import Provenance, Tier, format_bytes, format_count, format_flops
from translution.planner.costs import TABLES, count_flops, count_parameters
from translution.planner.plans import Plan, load_plan

from ..charts.memory_timeline import combined_picture, describe_constant, draw_timelines, is_constant
from ..inputs.plan_command import plan_command
from ..inputs.prediction import breakdown_rows, tier_name, timelines_of
from ..inputs.run_accuracy import compare_run
from ..inputs.training_runs import find_shown_run, has_measurement, read_run
from ..render.document import CellValue, Column, Picture, Section, Table, format_value


@dataclass(frozen=True, slots=True)
class PlanReport:
    """Sections and charts of one plan, and of its run."""

    title: str
    plan: Plan
    sections: tuple[Section, ...]
    picture: dict[str, Any]
    """Memory timelines of all tiers as one Vega-Lite specification."""
    measured: Section | None
    """Predicted and measured memory of the run, if it measured any."""


def summarize(plan: Plan) -> tuple[tuple[str, str], ...]:
    """Return the plan as pairs of a label and a text."""
    model, training, cluster, zero = plan.model, plan.training, plan.cluster, plan.zero
    parameters = count_parameters(model)
    tables = parameters.components.get(TABLES, 0) / parameters.total
    batch = training.global_batch(cluster.world_size)
    offloads = {"optimizer": zero.offload_optimizer.device, "parameters": zero.offload_param.device}
    offload = ", ".join(f"{what} to {device}" for what, device in offloads.items() if device != "none")
    group = plan.parallel.relation
    shared = f", relations shared in groups of {group} ranks" if group > 1 else ""
    peak, capacity = plan.prediction.peak_bytes, cluster.device_memory_bytes
    relative = f", roles {model.roles}" if model.operator in ("translution", "alpha", "absolute") else ""
    return (
        ("Model", f"{model.name}: {model.family}, {model.depth} layers of width {model.dim}, {model.tokens} tokens"),
        ("Operator", f"{model.operator}{relative}"),
        ("Parameters", f"{format_count(parameters.total)}, {tables:.1%} of them in relation tables"),
        ("Cluster", f"{cluster.name}: {cluster.nodes} × {cluster.ranks_per_node} ranks on {cluster.device}"),
        ("Sharding", f"{zero.name}, {f'offload of {offload}' if offload else 'no offload'}{shared}"),
        ("Tiles", "full tables" if plan.tile_relations is None else f"{plan.tile_relations} relations per tile"),
        ("Precision", f"{training.precision_text}, master copy {training.master_dtype}, {training.optimizer}"),
        (
            "Batch",
            f"{training.micro_batch} per rank × {training.gradient_accumulation_steps} × "
            f"{cluster.world_size} ranks = {batch}",
        ),
        ("Work", f"{format_flops(count_flops(model).training_step * batch)} per step, {training.steps} steps"),
        ("Peak of a rank", f"{format_bytes(peak)} of {format_bytes(capacity)}, {peak / capacity:.1%}"),
        ("Made by", plan.made_by),
        *([("Command", command)] if (command := plan_command(plan)) else []),
    )


def _once(texts: Iterable[str]) -> str:
    return "; ".join(dict.fromkeys(text for text in texts if text))


def _heading(tier: str) -> str:
    return f"{tier[0].upper()}{tier[1:]}"


def _breakdown_table(tier: str, own: list[Mapping[str, Any]], key: str, made: Provenance) -> Table:
    """Return the table of one tier from its rows of `breakdown_rows`, with a column per phase."""
    phases = {row["phase"]: row for row in own}
    rows: list[tuple[CellValue, ...]] = []
    for name in dict.fromkeys(row["name"] for row in own):
        sizes = [[row["bytes"] for row in own if (row["name"], row["phase"]) == (name, phase)] for phase in phases]
        rows.append((name, *(sum(found) if found else None for found in sizes)))
    foot: list[tuple[CellValue, ...]] = [("peak", *(row["peak_bytes"] for row in phases.values()))]
    sites = tuple(row["site"] for row in phases.values())
    if any(sites):
        foot.append(("where", *sites))
    return Table(
        key=key,
        heading=_heading(tier),
        caption=f"Bytes of one rank, {tier} memory, by phase",
        columns=(Column(title="item"), *(Column(title=phase, kind="bytes") for phase in phases)),
        rows=tuple(rows),
        foot=tuple(foot),
        made=made,
    )


def _sources_table(tier: str, own: list[Mapping[str, Any]], key: str, made: Provenance) -> Table:
    """Return the table that says how each item of a tier is counted."""
    rows: list[tuple[CellValue, ...]] = []
    for name in dict.fromkeys(row["name"] for row in own):
        named = [row for row in own if row["name"] == name]
        rows.append((name, _once(row["formula"] for row in named), _once(row["source"] for row in named)))
    return Table(
        key=f"{key}-sources",
        caption=f"How each item of {tier} memory is counted",
        columns=(
            Column(title="item"),
            Column(title="how it is counted", kind="sentence"),
            Column(title="source", kind="code"),
        ),
        rows=tuple(rows),
        made=made,
    )


def breakdown_tables(rows: Iterable[Mapping[str, Any]], prefix: str, made: Provenance) -> Iterator[Table]:
    """Yield two tables per tier from the rows of `breakdown_rows`: its sizes by phase, and how they are counted."""
    tiers: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        tiers.setdefault(tier_name(row["tier"]), []).append(row)
    for number, (tier, own) in enumerate(tiers.items()):
        key = f"{prefix}breakdown-{number}"
        yield from (_breakdown_table(tier, own, key, made), _sources_table(tier, own, key, made))


def _measured(run: Path, key: str) -> Section:
    """Return the section with predicted and measured memory of a run."""
    found = read_run(run, run.name)
    rows: list[tuple[CellValue, ...]] = []
    for row in compare_run(run).to_dict("records"):
        ratio = float(row["ratio"])
        sizes = int(row["predicted_bytes"]), int(row["measured_bytes"])
        rows.append((row["what"], int(row["rank"]), *sizes, ratio if ratio == ratio else None))
    titles = {"rank": "integer", "predicted": "bytes", "measured": "bytes", "predicted / measured": "ratio"}
    columns = [Column.model_validate({"title": title, "kind": kind}) for title, kind in titles.items()]
    table = Table(
        key=f"{key}-memory",
        caption=f"Memory per rank of {run}",
        columns=(Column(title="item"), *columns),
        rows=tuple(rows),
        how="Measured by",
        made=None if found is None else found.made,
    )
    return Section(key=key, title=f"Predicted and measured memory of run {run.name}", parts=(table,))


def _timelines(plan: Plan, title: str, prefix: str, made: Provenance) -> tuple[Section, dict[str, Any]]:
    """Return the section of the timelines, and the specification of one chart with all tiers."""
    ranks = f"{plan.cluster.world_size} rank{'s' if plan.cluster.world_size > 1 else ''}"
    subtitle = f"{plan.zero.name} on {ranks}, {plan.training.precision_text}, {plan.training.micro_batch} samples each"
    host_share = plan.cluster.host_memory_bytes // plan.cluster.ranks_per_node
    capacities: dict[str, int] = {Tier.DEVICE: plan.cluster.device_memory_bytes, Tier.HOST: host_share}
    named = {tier_name(tier): timeline for tier, timeline in timelines_of(plan).items()}
    charts = draw_timelines(named, title, subtitle, capacities)
    constant = " ".join(describe_constant(each, tier) for tier, each in named.items() if is_constant(each))
    captions = [f"Live bytes of one rank in {tier} memory; a point is the maximum of its events." for tier in charts]
    if constant:
        captions[-1] += f" {constant}"
    pictures = [
        Picture(
            key=f"{prefix}timeline-{number}",
            heading=_heading(tier) if len(charts) > 1 else None,
            caption=caption,
            name=f"Timeline of {tier} memory",
            spec=dict(chart.to_dict()),
            narrow=True,
            made=made,
        )
        for number, ((tier, chart), caption) in enumerate(zip(charts.items(), captions, strict=True))
    ]
    text = (
        "Live bytes after every allocation and release of the step. Hover over the chart, or touch it, for sizes; drag "
        "over it to zoom."
    )
    section = Section(key=f"{prefix}timeline", title="Memory over a step", text=(text,), parts=tuple(pictures))
    return section, combined_picture(charts)


def verdict(plan: Plan) -> str:
    """Return whether a plan fits, what a rank needs at most, and the predicted time of a step, as sentences."""
    peak, capacity = plan.prediction.peak_bytes, plan.cluster.device_memory_bytes
    share = f"{peak / capacity:.0%}" if peak >= 0.01 * capacity else "under 1%"
    text = (
        f"A rank needs at most {format_bytes(peak)} of {format_bytes(capacity)} ({share}): the plan "
        f"{'fits' if peak <= capacity else 'does not fit'}."
    )
    if plan.time is None:
        return text
    seconds = format_value((plan.time.likely_s, plan.time.low_s, plan.time.high_s), "seconds")
    batch = plan.training.global_batch(plan.cluster.world_size)
    return f"{text} A step of {batch:,} samples is predicted to take {seconds}."


def report_plan(folder: Path, made: Provenance, prefix: str = "") -> PlanReport:
    """Make the sections of a plan folder or a run folder.

    Args:
        folder: plan folder or run folder.
        made: provenance of the predictions.
        prefix: prefix of the keys, which keeps several plans on a page apart.

    Raises:
        InputError: if the folder is neither, or a file in it is invalid.
    """
    plan = load_plan(folder)
    title = f"{plan.model.name} on {plan.cluster.name}"
    rows: list[tuple[CellValue, ...]] = list(summarize(plan))
    columns = (Column(title="property"), Column(title="value"))
    summary = Table(
        key=f"{prefix}summary",
        caption="Summary of the plan",
        columns=columns,
        rows=tuple(rows),
        sortable=False,
        made=made,
    )
    timelines, picture = _timelines(plan, title, prefix, made)
    sections = [timelines, Section(key=f"{prefix}plan", title="Plan", parts=(summary,))]
    text = "Every item that is live at the peak of each phase, how it is counted, and the source of the formula."
    breakdowns = tuple(breakdown_tables(breakdown_rows(plan.prediction), prefix, made))
    sections.append(Section(key=f"{prefix}breakdown", title="Memory breakdown", text=(text,), parts=breakdowns))
    run = find_shown_run(folder)
    measured = _measured(run, f"{prefix}measured") if run is not None and has_measurement(run) else None
    return PlanReport(title, plan, tuple(sections), picture, measured)
