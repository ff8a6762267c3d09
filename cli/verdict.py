"""What `plan` prints first: whether the model fits, and the figures that one decides by, in at most 15 lines."""

from __future__ import annotations

import shlex
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.text import Text

from translution import planner
from translution.planner.common import Tier, duration_unit, format_bytes, format_count
from translution.planner.config import OPERATOR_LABELS
from translution.planner.costs import count_parameters
from translution.planner.plans import PLAN_FILE
from translution.planner.search import Advice, HybridRow, describe_hybrid, next_best

MOST_LINES = 15
"""Lines of a verdict in 80 columns."""
_ADVISED_LINES = MOST_LINES - 4
"""Lines for the changes that would make a model fit."""
_LABEL = 11
"""Characters of the labels on the left."""


def print_verdict(result: planner.SearchResult, folder: Path | None, minimize: str, to: Console) -> None:
    """Print the verdict on a plan that fits.

    Args:
        result: the search.
        folder: the plan folder; None if none was written.
        minimize: what the search minimized.
        to: the console.
    """
    plan = result.plan
    aim = "" if minimize == "time" else f", with the least {minimize}"
    to.print(Text(f"{plan.model.name} on {plan.cluster.name}: fits{aim}", style="bold green"))
    other = "next best" if minimize == "time" else "fastest"
    rows = (*_plan_rows(result), *_memory_rows(plan), *_time_rows(plan), (other, _next_best(result)))
    lines = _lines(rows, to.width)
    if folder is not None:
        configuration = "train_fsdp2.py" if plan.zero.uses_fsdp2 else "ds_config.json"
        files = f"{PLAN_FILE}, {configuration}, launch scripts, README.md with all reasons"
        lines += _lines([("files", files)], to.width)
    to.print(Text("\n").join(lines), soft_wrap=True)
    if folder is None:
        to.print("nothing written: --out FOLDER writes a plan folder; all reasons: --verbose")
        return
    hosts = ["--hostfile", str(folder / "hostfile")] if plan.cluster.nodes > 1 else []
    command = ["translution", "launch", str(folder), *hosts]
    if plan.zero.uses_fsdp2:
        command = ["sh", str(folder / "launch-torchrun.sh")]
    to.print(f"wrote {folder}; run it: {shlex.join(command)}", soft_wrap=True)


def _lines(rows: Iterable[tuple[str, str]], width: int, label: int = _LABEL) -> list[Text]:
    """Return labelled texts as lines of at most a width; only a longer word makes a longer line."""
    lines = []
    for name, text in rows:
        parts = textwrap.wrap(text, width - label, break_long_words=False, break_on_hyphens=False)
        for number, part in enumerate(parts):
            lines.append(Text.assemble((f"{'' if number else name:{label}}", "cyan"), part))
    return lines


def _nodes(count: int) -> str:
    return f"{count} node{'s' if count > 1 else ''}"


def _plan_rows(result: planner.SearchResult) -> Iterator[tuple[str, str]]:
    plan = result.plan
    model, training, cluster = plan.model, plan.training, plan.cluster
    tiles = "" if plan.tile_relations is None else f"; tiles of {plan.tile_relations} relations"
    parameters = format_count(count_parameters(model).total)
    yield "model", f"{parameters} parameters, {OPERATOR_LABELS[model.operator]}, {training.precision}{tiles}"
    strategy = next(verdict.strategy for verdict in result.strategies if verdict.chosen)
    group = plan.parallel.relation
    shared = f" in groups of {group}" if group > 1 else ""
    yield "strategy", f"{strategy}; {plan.world_size} ranks{shared} on {_nodes(cluster.nodes)}"
    accumulated = training.gradient_accumulation_steps
    split = f"{training.micro_batch} a rank" + (f" x {accumulated} accumulated" if accumulated > 1 else "")
    checkpointing = {"none": "no checkpointing", "block": "checkpointing of blocks"}.get(
        model.checkpointing, "checkpointing, offloaded"
    )
    yield "batch", f"{plan.global_batch:,} samples a step: {split}; {checkpointing}"


def _memory_rows(plan: planner.Plan) -> Iterator[tuple[str, str]]:
    prediction, cluster = plan.prediction, plan.cluster
    peak, capacity = prediction.peak_bytes, cluster.device_memory_bytes
    interval = ""
    if prediction.device_interval_bytes:
        low, high = map(format_bytes, prediction.device_interval_bytes)
        interval = f" ({low} to {high})"
    where = "device" if cluster.device == "cuda" else "memory"
    yield where, _peak(peak, "rank", capacity) + interval
    ranks = cluster.ranks_per_node
    if cluster.device == "cuda" and prediction.host_bytes:
        yield "host", _peak(prediction.host_bytes * ranks, "node", cluster.host_memory_bytes)
    if prediction.highest(Tier.NVME):
        yield "NVMe", _peak(prediction.highest(Tier.NVME) * ranks, "node", cluster.nvme_bytes)


def _peak(used: int, owner: str, capacity: int | None) -> str:
    text = f"peak {format_bytes(used)} a {owner}"
    if capacity is None:
        return text
    percent = f"{used / capacity:.0%}" if used >= capacity / 100 else "below 1%"
    return f"{text} of {format_bytes(capacity)}, {percent}"


def _rate(samples_per_s: float) -> str:
    return f"{samples_per_s:,.0f}" if samples_per_s >= 100 else f"{samples_per_s:.3g}"


def _time_rows(plan: planner.Plan) -> Iterator[tuple[str, str]]:
    time, cost = plan.time, plan.run_cost
    if time is None or cost is None:
        yield "step", "of unknown time: the cluster lacks a rate"
        return
    slow, fast = plan.global_batch / time.high_s, plan.global_batch / time.low_s
    yield (
        "step",
        f"{time.likely_s:.3g} s ({time.low_s:.3g} to {time.high_s:.3g}), "
        f"{_rate(time.samples_per_s)} samples/s ({_rate(slow)} to {_rate(fast)})",
    )
    epochs = ""
    if plan.training.epoch_steps is not None:
        epochs = f" ({plan.training.steps / plan.training.epoch_steps:.3g} epochs)"
    unit_s, unit = duration_unit(cost.likely_s)
    low, likely, high = (f"{seconds / unit_s:,.3g}" for seconds in (cost.low_s, cost.likely_s, cost.high_s))
    price = "" if cost.price is None else f", price {cost.price:,.0f}"
    yield (
        "run",
        f"{cost.steps:,} steps{epochs} in {likely} {unit} ({low} to {high}), "
        f"{cost.gpu_hours:.3g} {'GPU' if plan.cluster.device == 'cuda' else 'rank'}-hours{price}",
    )


def _next_best(result: planner.SearchResult) -> str:
    other = next_best(result)
    if other is None or other.seconds is None:
        return "none: no other strategy fits or was allowed"
    chosen = next((verdict.seconds for verdict in result.strategies if verdict.chosen), None)
    ratio = other.seconds / chosen if chosen else 1.0
    times = "as fast" if abs(ratio - 1) < 0.005 else f"{ratio:.3g} times the chosen"
    return f"{other.strategy}: {other.seconds:.3g} s a step, {times}"


def print_no_plan(
    error: planner.NoPlanFits, name: str, cluster: str, hybrids: Mapping[Path | int, HybridRow], to: Console
) -> None:
    """Print the verdict on a model that does not fit, and the changes that would make it.

    Args:
        error: what the search raised.
        name: the model's name.
        cluster: the cluster's name.
        hybrids: hybrid models that fit, by the file that was written for each, or by number if none was.
        to: the console.
    """
    to.print(Text(f"{name} on {cluster}: does not fit", style="bold red"))
    rows = list_changes(error.advice, hybrids)
    if not rows:
        to.print("no change was found that makes a plan fit; what was tried: --verbose")
        return
    to.print("Any one of these changes makes a plan fit:")
    label = 2 + max(len(kind) for kind, _ in rows)
    shown: list[Text] = []
    for number, row in enumerate(rows):
        lines = _lines([row], to.width, label)
        if len(shown) + len(lines) > _ADVISED_LINES:
            shown.append(Text(f"{'':{label}}and {len(rows) - number} more"))
            break
        shown += lines
    to.print(Text("\n").join(shown), soft_wrap=True)
    written = next((path for path in hybrids if isinstance(path, Path)), None)
    files = "" if written is None else f"spec files of the hybrids: {written.parent}; "
    to.print(f"{files}what was tried: --verbose", soft_wrap=True)


def list_changes(advice: Sequence[Advice], hybrids: Mapping[Path | int, HybridRow]) -> list[tuple[str, str]]:
    """Return kind and text of every change that makes a plan fit, the cheapest first."""
    rows = [(entry.kind, entry.text) for entry in advice]
    for path, row in hybrids.items():
        rows.append(("hybrid", describe_hybrid(row) + (f" ({path.name})" if isinstance(path, Path) else "")))
    return rows
