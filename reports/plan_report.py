"""What a report of a plan holds: its summary, the ledger, the timelines and its newest measured run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from translution.distributed.run_files import RUNS, memory_path
from translution.planner.flops import count_flops
from translution.planner.parameters import TABLES, count_parameters
from translution.planner.plan import Plan, load_plan
from translution.planner.provenance import Provenance
from translution.planner.units import format_bytes, format_count, format_flops

from .accuracy import compare, metrics_of
from .curve import draw_curve
from .prediction import DEVICE, HOST, ledger_rows, tier_name, timelines_of
from .timeline import draw_timelines, one_picture


@dataclass(frozen=True, slots=True)
class TierLedger:
    """The entries of one tier, a column per phase."""

    tier: str
    """In words."""
    phases: tuple[str, ...]
    peaks: tuple[int, ...]
    moments: tuple[str, ...]
    rows: tuple[tuple[str, tuple[int | None, ...], str, str], ...]
    """Name, bytes in each phase, how they are counted, and the source."""


@dataclass(frozen=True, slots=True)
class RunReport:
    """What the newest measured run of a plan gave."""

    folder: str
    rows: tuple[Mapping[Any, Any], ...]
    """As `compare` gives them."""
    curve: dict[str, Any] | None
    accuracy: float | None
    made: Provenance | None


@dataclass(frozen=True, slots=True)
class PlanReport:
    """Everything the page shows."""

    title: str
    summary: tuple[tuple[str, str], ...]
    ledgers: tuple[TierLedger, ...]
    timelines: dict[str, dict[str, Any]]
    """Vega-Lite specifications by tier, in words."""
    picture: dict[str, Any]
    """That of all tiers in one."""
    run: RunReport | None


def summarize(plan: Plan) -> tuple[tuple[str, str], ...]:
    """The plan as pairs of what and how much."""
    model, training, cluster, zero = plan.model, plan.training, plan.cluster, plan.zero
    parameters = count_parameters(model)
    tables = parameters.components.get(TABLES, 0) / parameters.total
    batch = training.global_batch(cluster.ranks)
    offloads = {"optimizer": zero.offload_optimizer.device, "parameters": zero.offload_param.device}
    offload = ", ".join(f"{what} to {device}" for what, device in offloads.items() if device != "none")
    peak, capacity = plan.prediction.peak_bytes, cluster.device_memory_bytes
    relative = f", roles {model.roles}" if model.operator in ("translution", "alpha", "absolute") else ""
    return (
        ("Model", f"{model.name}: {model.family}, {model.depth} layers of width {model.dim}, {model.tokens} tokens"),
        ("Operator", f"{model.operator}{relative}"),
        ("Parameters", f"{format_count(parameters.total)}, {tables:.1%} of them in relation tables"),
        ("Cluster", f"{cluster.name}: {cluster.nodes} × {cluster.ranks_per_node} ranks on {cluster.device}"),
        ("ZeRO", f"stage {zero.stage}, {f'offload of {offload}' if offload else 'no offload'}"),
        ("Tiles", "whole tables" if plan.tile_relations is None else f"{plan.tile_relations} relations per tile"),
        ("Precision", f"{training.precision}, master copy {training.master_dtype}, {training.optimizer}"),
        ("Batch", f"{training.micro_batch} per rank × {training.accumulation} × {cluster.ranks} ranks = {batch}"),
        ("Work", f"{format_flops(count_flops(model).training_step * batch)} per step, {training.steps} steps"),
        ("Peak of a rank", f"{format_bytes(peak)} of {format_bytes(capacity)}, {peak / capacity:.1%}"),
        ("Made by", plan.made_by),
    )


def _once(texts: Iterable[str]) -> str:
    return "; ".join(dict.fromkeys(text for text in texts if text))


def ledgers_of(rows: Iterable[Mapping[str, Any]]) -> tuple[TierLedger, ...]:
    """The rows of `ledger_rows` as one table per tier."""
    tiers: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        tiers.setdefault(tier_name(row["tier"]), []).append(row)
    ledgers = []
    for tier, own in tiers.items():
        phases = {row["phase"]: row for row in own}
        entries = []
        for name in dict.fromkeys(row["name"] for row in own):
            named = [row for row in own if row["name"] == name]
            sizes = [[row["bytes"] for row in named if row["phase"] == phase] for phase in phases]
            cells = tuple(sum(found) if found else None for found in sizes)
            entries.append((name, cells, _once(row["formula"] for row in named), _once(row["source"] for row in named)))
        peaks = tuple(row["peak_bytes"] for row in phases.values())
        moments = tuple(row["moment"] for row in phases.values())
        ledgers.append(TierLedger(tier, tuple(phases), peaks, moments, tuple(entries)))
    return tuple(ledgers)


def _measured_run(folder: Path) -> Path | None:
    """The run folder itself, or the newest run of a plan folder, if any rank has measured something."""
    runs = sorted((folder / RUNS).glob("*"), key=lambda path: path.stat().st_mtime, reverse=True)
    measured = (run for run in [folder, *runs] if any(memory_path(run, 0).parent.glob("rank_*.json")))
    return next(measured, None)


def _report_run(folder: Path) -> RunReport | None:
    run = _measured_run(folder)
    if run is None:
        return None
    table = compare(run)
    metrics = metrics_of(run)
    evaluations = metrics[metrics["event"] == "evaluation"]
    steps = metrics[metrics["event"] == "step"]
    started = metrics[metrics["event"] == "start"].to_dict("records")
    made = started[-1].get("made") if started else None
    return RunReport(
        folder=str(run),
        rows=tuple(table.to_dict("records")),
        curve=None if steps.empty else dict(draw_curve(steps, f"Loss of {run.name}").to_dict()),
        accuracy=None if evaluations.empty else float(evaluations["accuracy"].iloc[-1]),
        made=Provenance.model_validate(made) if isinstance(made, dict) else None,
    )


def report_plan(folder: Path) -> PlanReport:
    """Read a plan folder or a run folder.

    Raises:
        InputError: if it is neither, or damaged.
    """
    plan = load_plan(folder)
    ranks = f"{plan.cluster.ranks} rank{'s' if plan.cluster.ranks > 1 else ''}"
    subtitle = f"ZeRO-{plan.zero.stage} on {ranks}, {plan.training.precision}, {plan.training.micro_batch} samples each"
    title = f"{plan.model.name} on {plan.cluster.name}"
    host_share = plan.cluster.host_memory_bytes // plan.cluster.ranks_per_node
    capacities = {DEVICE: plan.cluster.device_memory_bytes, HOST: host_share}
    named = {tier_name(tier): timeline for tier, timeline in timelines_of(plan).items()}
    charts = draw_timelines(named, title, subtitle, capacities)
    return PlanReport(
        title=title,
        summary=summarize(plan),
        ledgers=ledgers_of(ledger_rows(plan.prediction)),
        timelines={tier: dict(chart.to_dict()) for tier, chart in charts.items()},
        picture=one_picture(charts),
        run=_report_run(folder),
    )
