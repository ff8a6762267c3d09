"""Why a plan was chosen: every family of plans with its reason, every knob with the next best, and the Pareto set."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..common.schema import Schema, stored_as
from ..common.units import format_bytes
from ..config.model import Positive
from ..plans.plan import Plan
from .candidate import Candidate, Capacity, to_plan
from .searcher import Searcher
from .space import Strategy

PARETO_ROWS = 12


class StrategyVerdict(Schema):
    """A stage with an offload: what became of it."""

    strategy: str = stored_as("family")
    chosen: bool = False
    seconds: float | None = None
    """Of an optimizer step, by the family's best plan that fits."""
    reason: str


class KnobReason(Schema):
    """A knob of the chosen plan, and why it has its value."""

    knob: str
    value: str
    reason: str


class ParetoPoint(Schema):
    """A plan than which none is better in time, nodes and memory at once."""

    nodes: Positive
    strategy: str = stored_as("family")
    micro_batch: Positive
    checkpointing: str
    tile_relations: Positive | None
    step_s: float
    device_bytes: int
    """By the closed form: never less than the ledger's."""


class SearchResult(Schema):
    """The chosen plan and what it was chosen from."""

    plan: Plan
    considered: int
    strategies: tuple[StrategyVerdict, ...] = stored_as("families")
    knobs: tuple[KnobReason, ...]
    pareto: tuple[ParetoPoint, ...]


def shortage(candidate: Candidate, capacity: Capacity) -> str:
    """Which memory a candidate overflows, by how much, and what fills it; by the closed forms."""
    bounds, ranks = candidate.bounds, candidate.cluster.ranks_per_node
    device, host = capacity.device_of(bounds), capacity.host_of(bounds)
    if device > capacity.device:
        parts = {
            "states that stay": bounds.states,
            "activations": bounds.activations,
            "whole tensors, their gradients and copies": bounds.device - bounds.states - bounds.activations,
        }
        bound = max(parts, key=lambda name: parts[name])
        where = "on the device" if capacity.separate else "of a rank"
        usable = format_bytes(capacity.device)
        return f"{format_bytes(device)} {where}, {usable} usable; bound: {bound}, {format_bytes(parts[bound])}"
    if capacity.separate and host > capacity.host:
        return f"{format_bytes(host * ranks)} of a node's host memory, {format_bytes(capacity.host * ranks)} usable"
    assert capacity.nvme is not None
    return f"{format_bytes(bounds.nvme * ranks)} of a node's NVMe, {format_bytes(capacity.nvme * ranks)} usable"


def strategy_verdicts(searcher: Searcher, best: Candidate | None) -> tuple[StrategyVerdict, ...]:
    """Every family that was asked for, with its reason."""
    fastest: dict[Any, Candidate] = {}
    for candidate in searcher.feasible():
        known = fastest.get(candidate.strategy)
        if known is None or candidate.seconds < known.seconds:
            fastest[candidate.strategy] = candidate
    verdicts = []
    for strategy in dict.fromkeys((*searcher.strategies, *searcher.infeasible)):
        if best is not None and strategy == best.strategy:
            reason = f"chosen for the least {searcher.constraints.minimize}"
            verdicts.append(StrategyVerdict(strategy=strategy.text, chosen=True, seconds=best.seconds, reason=reason))
        elif strategy in searcher.infeasible:
            verdicts.append(StrategyVerdict(strategy=strategy.text, reason=searcher.infeasible[strategy]))
        elif strategy in fastest:
            other = fastest[strategy]
            reason = f"fits: {other.seconds:.3g} s a step on {other.cluster.nodes} node(s)"
            if best is not None and other.cluster.nodes == best.cluster.nodes:
                reason += f", {other.sample_seconds / best.sample_seconds:.2f} times the chosen"
            verdicts.append(StrategyVerdict(strategy=strategy.text, seconds=other.seconds, reason=reason))
        elif strategy in searcher.closest:
            closest = searcher.closest[strategy]
            reason = "fits by a little, with a slower plan"
            if closest.peak_utilization > 1:
                reason = shortage(closest, searcher.capacities[closest.cluster.nodes])
            verdicts.append(StrategyVerdict(strategy=strategy.text, reason=reason))
        else:
            reason = "a rank's shares are below 1 MiB, which DeepSpeed never writes to NVMe"
            verdicts.append(StrategyVerdict(strategy=strategy.text, reason=reason))
    return tuple(verdicts)


Reader = Callable[[Candidate], object]
_KNOBS: dict[str, Reader] = {
    "nodes": lambda c: c.cluster.nodes,
    "stage and offload": lambda c: c.strategy,
    "checkpointing": lambda c: c.spec.checkpointing,
    "micro-batch": lambda c: c.training.micro_batch,
    "relations per tile": lambda c: c.tile_relations,
    "overlap_comm": lambda c: c.zero.overlap_comm,
    "prefetch_bucket_elements": lambda c: c.zero.prefetch_bucket_elements,
    "reduce_bucket_elements": lambda c: c.zero.reduce_bucket_elements,
    "sub_group_elements": lambda c: c.zero.sub_group_elements,
    "swap ahead (read, write)": lambda c: (
        c.zero.offload_optimizer.pipeline_read,
        c.zero.offload_optimizer.pipeline_write,
    ),
}
_FIXED = (
    ("max_reuse_distance_elements", "with reuse every tile that was gathered would stay gathered"),
    ("persistence_threshold_elements", "tensors below the smallest tile stay whole; a gather of one takes longer"),
    ("max_live_elements", "bounds how far prefetch runs ahead"),
)


def _by_first_difference(searcher: Searcher, best: Candidate) -> dict[str, list[Candidate]]:
    """Candidates by the first knob of the list in which they differ from the chosen."""
    chosen = [(name, read, read(best)) for name, read in _KNOBS.items()]
    found: dict[str, list[Candidate]] = {name: [] for name in _KNOBS}
    for candidate in searcher.candidates:
        name = next((name for name, read, value in chosen if read(candidate) != value), None)
        if name is not None:
            found[name].append(candidate)
    return found


def _shown(value: object) -> str:
    return value.text if isinstance(value, Strategy) else str(value)


def knob_reasons(searcher: Searcher, best: Candidate) -> tuple[KnobReason, ...]:
    """Every knob of the chosen plan beside the next best value of it."""
    objective = searcher.constraints.minimize
    reasons, differing = [], _by_first_difference(searcher, best)
    for knob, read in _KNOBS.items():
        others = differing[knob]
        feasible = [c for c in others if c.peak_utilization <= 1]
        if not others and (knob.startswith("swap") or (best.zero.stage < 3 and "elements" in knob)):
            continue
        if feasible:
            other = min(feasible, key=lambda c: c.cost(objective))
            size = format_bytes(other.bounds.device)
            reason = f"next best is {_shown(read(other))}: {other.seconds:.3g} s a step, at most {size} of tensors"
        elif others:
            reason = f"no other leaves the headroom, such as {_shown(read(others[0]))}"
        else:
            reason = "given, or the only one that suits"
        reasons.append(KnobReason(knob=knob, value=_shown(read(best)), reason=reason))
    if best.zero.stage == 3:
        reasons += [KnobReason(knob=knob, value=str(getattr(best.zero, knob)), reason=why) for knob, why in _FIXED]
    return tuple(reasons)


def pareto(searcher: Searcher) -> tuple[ParetoPoint, ...]:
    """Plans that fit and are not beaten in time, nodes and memory together, the fastest first."""
    chosen: list[Candidate] = []
    ordered = sorted(searcher.feasible(), key=lambda c: (c.sample_seconds, c.bounds.device, c.cluster.nodes))
    for candidate in ordered:
        size, nodes = candidate.bounds.device, candidate.cluster.nodes
        # A saving of less than a hundredth is none.
        if all(size < 0.99 * known.bounds.device or nodes < known.cluster.nodes for known in chosen):
            chosen.append(candidate)
    step = max(1, -(-len(chosen) // PARETO_ROWS))
    return tuple(
        ParetoPoint(
            nodes=c.cluster.nodes,
            strategy=c.strategy.text,
            micro_batch=c.training.micro_batch,
            checkpointing=c.spec.checkpointing,
            tile_relations=c.tile_relations,
            step_s=c.seconds,
            device_bytes=c.bounds.device,
        )
        for c in chosen[::step]
    )


def explain(searcher: Searcher, best: Candidate) -> SearchResult:
    """The chosen plan with every reason.

    Args:
        searcher: after its search.
        best: what it found.
    """
    return SearchResult(
        plan=to_plan(best),
        considered=searcher.considered,
        strategies=strategy_verdicts(searcher, best),
        knobs=knob_reasons(searcher, best),
        pareto=pareto(searcher),
    )
