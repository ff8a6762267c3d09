"""Tables that several commands print: memory, and the result of a search."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from rich.table import Table

from translution import planner
from translution.planner.common import Phase, Tier, format_bytes
from translution.planner.memory import MemoryEstimate
from translution.planner.search import Advice, HybridRow, StrategyVerdict
from translution.planner.timing import traffic_rows

from .output import make_table
from .verdict import list_changes


def strategies_table(strategies: Sequence[StrategyVerdict]) -> Table:
    """Return every strategy with its verdict; a star marks the chosen one."""
    rows = [(f"{'* ' if verdict.chosen else ''}{verdict.strategy}", verdict.reason) for verdict in strategies]
    return make_table("Strategies tried", ("strategy", "result"), rows, text_columns=2)


def traffic_table(plan: planner.Plan) -> Table | None:
    """Return what a rank sends in a step under several ways to share out the model; None if it sends nothing."""
    rows = [
        (row.strategy, format_bytes(row.node_bytes), format_bytes(row.network_bytes))
        for row in traffic_rows(plan.run_config)
    ]
    title = "What a rank sends in a step with this batch"
    return make_table(title, ("way to share out the model", "on its node", "on the network"), rows) if rows else None


def knobs_table(result: planner.SearchResult) -> Table:
    """Return the value of every knob with its reason."""
    rows = [(knob.knob, knob.value, knob.reason) for knob in result.knobs]
    title = f"Best of {result.considered:,} candidates"
    return make_table(title, ("knob", "value", "reason"), rows, text_columns=3)


def pareto_table(result: planner.SearchResult) -> Table:
    """Return the Pareto set of time, device memory and nodes."""
    rows = [
        (
            point.strategy,
            point.checkpointing,
            str(point.micro_batch),
            str(point.nodes),
            f"{point.step_s:.3g}",
            format_bytes(point.device_bytes),
        )
        for point in result.pareto
    ]
    columns = ("strategy", "checkpointing", "micro-batch", "nodes", "seconds", "device, at most")
    title = "Pareto set: nothing faster needs less memory or fewer nodes"
    return make_table(title, columns, rows, text_columns=2)


def step_time_table(plan: planner.Plan, time: planner.StepTime) -> Table:
    """Return the predicted time of a step by part."""
    rows = [
        (
            entry.name,
            entry.bound + (", overlaps computation" if entry.overlaps else ""),
            f"{entry.likely_s:.3g}",
            f"{entry.low_s:.3g} to {entry.high_s:.3g}",
        )
        for entry in time.breakdown
    ]
    rows.append(("step", time.bound, f"{time.likely_s:.3g}", f"{time.low_s:.3g} to {time.high_s:.3g}"))
    rates = "measured rates" if plan.cluster.measured else "estimated fractions of peak rates"
    title = f"Predicted time of a step in seconds, from {rates}"
    return make_table(title, ("part", "bound by", "seconds", "interval"), rows, text_columns=2)


def format_run_cost(cost: planner.RunCost, time: planner.StepTime) -> str:
    """Return throughput, duration and price of a run as one line."""
    hours = f"{cost.likely_s / 3600:.3g} h ({cost.low_s / 3600:.3g} to {cost.high_s / 3600:.3g})"
    price = "" if cost.price is None else f", {cost.price:,.0f} at the cluster's price"
    return (
        f"{time.samples_per_s:.3g} samples/s, {time.mfu:.1%} of the peak; {cost.steps} steps of "
        f"{cost.samples // cost.steps} samples: {hours}, {cost.gpu_hours:.3g} GPU-hours{price}"
    )


def format_evaluation(plan: planner.Plan) -> str:
    """Return how a plan evaluates held-out samples, as one line."""
    evaluation = plan.evaluation
    if evaluation is None:
        return "no evaluation: evaluation_samples is none, or the data is synthetic"
    memory = format_bytes(plan.prediction.bytes_of(Phase.EVALUATION))
    limit = "all held-out samples" if evaluation.max_samples is None else f"at most {evaluation.max_samples:,} samples"
    text = f"evaluation of {limit}: {evaluation.micro_batch} at once on a rank, {memory}"
    if evaluation.likely_s is None:
        return text
    text += f", {evaluation.likely_s:.3g} s ({evaluation.low_s:.3g} to {evaluation.high_s:.3g}) a pass"
    if evaluation.max_samples is None:
        return text
    passes = evaluation.passes(evaluation.max_samples, plan.world_size)
    return f"{text}, {passes * evaluation.likely_s:.3g} s in all"


def advice_table(advice: Sequence[Advice], hybrids: Mapping[Path | int, HybridRow]) -> Table:
    """Return the changes that each make a plan fit.

    Args:
        advice: changes, cheapest first.
        hybrids: hybrid models by their spec file, or by number if none was written.
    """
    title = "Any one of these changes makes a plan fit"
    return make_table(title, ("change", "to"), list_changes(advice, hybrids), text_columns=2)


def phase_table(title: str, prediction: MemoryEstimate) -> Table:
    """Return the peak of each tier in each phase."""
    tiers = prediction.tiers
    rows = [
        (
            phase,
            *(format_bytes(prediction.bytes_of(phase, tier)) if prediction.peak(phase, tier) else "" for tier in tiers),
        )
        for phase in Phase
        if any(prediction.peak(phase, tier) for tier in tiers)
    ]
    return make_table(title, ("phase", *tiers), rows)


def peak_tables(prediction: MemoryEstimate, tiers: tuple[Tier, ...] = ()) -> Iterator[Table]:
    """Yield one table per tier with the items of its highest peak."""
    for tier in tiers or prediction.tiers:
        worst = prediction.worst(tier)
        assert worst is not None  # `tiers` are those that hold anything.
        rows = [(entry.name, entry.formula, entry.source, format_bytes(entry.bytes)) for entry in worst.breakdown]
        where = f"{tier}: {format_bytes(worst.bytes)} in {worst.phase}, at {worst.site}"
        if tier == "device" and prediction.device_interval_bytes:
            low, high = map(format_bytes, prediction.device_interval_bytes)
            where += f"; {low} to {high} depending on the device overhead"
            if prediction.shown_interval_bytes:
                low, high = map(format_bytes, prediction.shown_interval_bytes)
                where += f"; nvidia-smi may show {low} to {high}"
        yield make_table(where, ("item", "formula", "source", "size"), rows, text_columns=3)
