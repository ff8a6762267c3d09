"""What a search found next to its plan: the next best strategy, and all reasons for the plan folder's README."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from ..common.units import format_bytes
from ..plans.folder import write_plan_folder
from ..timing.traffic import traffic_rows
from .plan_search import SearchResult
from .verdicts import StrategyVerdict


def next_best(result: SearchResult) -> StrategyVerdict | None:
    """Return the fastest strategy that fits, other than the chosen one; None if no other fits."""
    others = [verdict for verdict in result.strategies if not verdict.chosen and verdict.seconds is not None]
    return min(others, key=lambda verdict: verdict.seconds or 0.0, default=None)


def search_notes(result: SearchResult) -> str:
    """Return the strategies tried, the reason for every knob and the Pareto set as Markdown."""
    strategies = [(f"**{row.strategy}**" if row.chosen else row.strategy, row.reason) for row in result.strategies]
    knobs = [(knob.knob, knob.value, knob.reason) for knob in result.knobs]
    pareto = [
        (
            f"{point.step_s:.3g}",
            format_bytes(point.device_bytes),
            point.nodes,
            point.strategy,
            point.micro_batch,
            point.checkpointing,
        )
        for point in result.pareto
    ]
    traffic = [
        (row.strategy, format_bytes(row.node_bytes), format_bytes(row.network_bytes))
        for row in traffic_rows(result.plan.run_config)
    ]
    columns = ("seconds", "device, at most", "nodes", "strategy", "micro-batch", "checkpointing")
    return "\n".join(
        (
            "\n## Strategies tried\n",
            _markdown_table(("strategy", "result"), strategies),
            *_traffic_notes(traffic),
            f"\n## Why these values: the best of {result.considered:,} candidates\n",
            _markdown_table(("knob", "value", "reason"), knobs),
            "\n## Pareto set: nothing faster needs less memory or fewer nodes\n",
            _markdown_table(columns, pareto),
            "",
        )
    )


def _traffic_notes(rows: Sequence[Sequence[object]]) -> Iterable[str]:
    """Yield the lines on what a rank sends; none without rows."""
    if rows:
        yield "\n## What a rank sends in a step with this batch\n"
        yield _markdown_table(("way to share out the model", "on its node", "on the network"), rows)


def _markdown_table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(str(cell).replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def write_search_folder(result: SearchResult, target: Path, *, force: bool = False) -> None:
    """Write the plan folder of a search, with the search's reasons in its README.

    Args:
        result: the search.
        target: the folder to create.
        force: write into an existing plan folder; its runs stay as they are.

    Raises:
        InputError: if the folder exists and ``force`` is false, is no plan folder, or cannot be written.
    """
    write_plan_folder(result.plan, target, force=force, notes=search_notes(result))
