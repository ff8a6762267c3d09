"""Why the search chose a plan: a verdict for every strategy, a reason for every knob, and the Pareto front."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pydantic import Field

from ..common.schema import Schema, stored_as
from ..common.types import Positive
from ..common.units import format_bytes
from .candidate import Candidate, Capacity
from .searcher import Searcher
from .space import Strategy

PARETO_ROWS = 12
"""At most this many points of the Pareto front."""


class StrategyVerdict(Schema):
    """What the search found for one strategy."""

    strategy: str = stored_as("family")
    chosen: bool = False
    seconds: float | None = None
    """Seconds of an optimizer step of the strategy's fastest plan that fits; null if none fits."""
    reason: str


class KnobReason(Schema):
    """One knob of the chosen plan, and the reason for its value."""

    knob: str
    value: str
    reason: str


class ParetoPoint(Schema):
    """A plan on the Pareto front: no other plan is better in time, nodes and memory together."""

    nodes: Positive
    strategy: str = stored_as("family")
    micro_batch: Positive
    checkpointing: str
    tile_relations: Positive | None
    step_s: float
    device_bytes: int
    """Upper bound of the device bytes of a rank."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """Values of `SearchConstraints` with which a search on that many nodes chooses this plan."""


def shortage(candidate: Candidate, capacity: Capacity) -> str:
    """Describe which memory a candidate exceeds, by how much, and what takes most of it, by the upper bound."""
    bounds, ranks = candidate.bounds, candidate.run.cluster.ranks_per_node
    device, host = capacity.device_of(bounds), capacity.host_of(bounds)
    if device > capacity.device:
        parts = {
            "states that stay": bounds.states,
            "activations": bounds.activations,
            "full tensors, their gradients and copies": bounds.device - bounds.states - bounds.activations,
        }
        bound = max(parts, key=lambda name: parts[name])
        where = "on the device" if capacity.separate else "of a rank"
        usable = format_bytes(capacity.device)
        return f"{format_bytes(device)} {where}, {usable} usable; most of it: {bound}, {format_bytes(parts[bound])}"
    if capacity.separate and host > capacity.host:
        return f"{format_bytes(host * ranks)} of a node's host memory, {format_bytes(capacity.host * ranks)} usable"
    assert capacity.nvme is not None
    return f"{format_bytes(bounds.nvme * ranks)} of a node's NVMe, {format_bytes(capacity.nvme * ranks)} usable"


def _why_untried(strategy: Strategy) -> str:
    """Why a strategy has no candidate."""
    if strategy.relation and not strategy.offload.uses_nvme:
        return "without replicas it partitions no more than stage 1 does"
    return "a rank's partitions are below 1 MiB, and DeepSpeed writes nothing that small to NVMe"


def strategy_verdicts(searcher: Searcher, best: Candidate | None) -> tuple[StrategyVerdict, ...]:
    """A verdict for every strategy that the constraints allow."""
    fastest: dict[Any, Candidate] = {}
    for candidate in searcher.feasible():
        known = fastest.get(candidate.strategy)
        if known is None or candidate.seconds < known.seconds:
            fastest[candidate.strategy] = candidate
    verdicts = []
    for strategy in dict.fromkeys((*searcher.strategies, *searcher.infeasible)):
        if best is not None and strategy == best.strategy:
            reason = f"chosen: minimal {searcher.constraints.minimize}"
            verdicts.append(StrategyVerdict(strategy=strategy.text, chosen=True, seconds=best.seconds, reason=reason))
        elif strategy in searcher.infeasible:
            verdicts.append(StrategyVerdict(strategy=strategy.text, reason=searcher.infeasible[strategy]))
        elif strategy in fastest:
            other = fastest[strategy]
            groups = f", groups of {other.run.parallel.relation}" if strategy.relation else ""
            reason = f"fits: {other.seconds:.3g} s a step on {other.nodes} node(s){groups}"
            if best is not None and other.nodes == best.nodes:
                reason += f", {other.sample_seconds / best.sample_seconds:.2f} times the chosen"
            verdicts.append(StrategyVerdict(strategy=strategy.text, seconds=other.seconds, reason=reason))
        elif strategy in searcher.closest:
            closest = searcher.closest[strategy]
            reason = "fits, but only with little room and a slower plan"
            if closest.peak_utilization > 1:
                reason = shortage(closest, searcher.capacities[closest.nodes])
            verdicts.append(StrategyVerdict(strategy=strategy.text, reason=reason))
        else:
            verdicts.append(StrategyVerdict(strategy=strategy.text, reason=_why_untried(strategy)))
    return tuple(verdicts)


_KNOBS: dict[str, Callable[[Candidate], object]] = {
    "nodes": lambda c: c.nodes,
    "ranks that share relations": lambda c: c.run.parallel.relation,
    "stage and offload": lambda c: c.strategy,
    "checkpointing": lambda c: c.run.model.checkpointing,
    "micro-batch": lambda c: c.run.training.micro_batch,
    "relations per tile": lambda c: c.run.tile_relations,
    "overlap_comm": lambda c: c.run.zero.overlap_comm,
    "prefetch_bucket_elements": lambda c: c.run.zero.prefetch_bucket_elements,
    "reduce_bucket_elements": lambda c: c.run.zero.reduce_bucket_elements,
    "sub_group_elements": lambda c: c.run.zero.sub_group_elements,
    "swap ahead (read, write)": lambda c: (
        c.run.zero.offload_optimizer.pipeline_read,
        c.run.zero.offload_optimizer.pipeline_write,
    ),
}
_FIXED = (
    ("max_reuse_distance_elements", "a larger distance would keep every gathered tile gathered"),
    (
        "persistence_threshold_elements",
        "tensors smaller than the smallest tile stay full; gathering one takes longer than its memory is worth",
    ),
    ("max_live_elements", "limits how far prefetch runs ahead"),
)


def _by_first_difference(searcher: Searcher, best: Candidate) -> dict[str, list[Candidate]]:
    """Group candidates by the first knob in which they differ from the chosen one."""
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
    """A reason for every knob: the next best value, or why there is none."""
    objective = searcher.constraints.minimize
    reasons, differing = [], _by_first_difference(searcher, best)
    knobs_of_zero3 = best.run.zero.stage == 3 and not best.run.zero.uses_fsdp2
    for knob, read in _KNOBS.items():
        others = differing[knob]
        feasible = [c for c in others if c.peak_utilization <= 1]
        if not others and (knob.startswith("swap") or (not knobs_of_zero3 and "elements" in knob)):
            continue
        if feasible:
            other = min(feasible, key=lambda c: c.cost(objective))
            size = format_bytes(other.bounds.device)
            reason = f"next best is {_shown(read(other))}: {other.seconds:.3g} s a step, at most {size} of tensors"
        elif others:
            reason = f"no other value leaves the headroom, for example {_shown(read(others[0]))}"
        else:
            reason = "given, or the only possible value"
        reasons.append(KnobReason(knob=knob, value=_shown(read(best)), reason=reason))
    if knobs_of_zero3:
        reasons += [KnobReason(knob=knob, value=str(getattr(best.run.zero, knob)), reason=why) for knob, why in _FIXED]
    return tuple(reasons)


def pareto(searcher: Searcher) -> tuple[ParetoPoint, ...]:
    """The Pareto front of time, nodes and device memory, fastest plan first."""
    chosen: list[Candidate] = []
    smallest: dict[int, int] = {}
    """Least device bytes of the chosen plans by number of nodes."""
    ordered = sorted(searcher.feasible(), key=lambda c: (c.sample_seconds, c.bounds.device, c.nodes))
    for candidate in ordered:
        size, nodes = candidate.bounds.device, candidate.nodes
        # A saving of less than 1% does not count.
        if all(size < 0.99 * known for count, known in smallest.items() if count <= nodes):
            chosen.append(candidate)
            smallest[nodes] = min(size, smallest.get(nodes, size))
    step = max(1, -(-len(chosen) // PARETO_ROWS))
    return tuple(
        ParetoPoint(
            nodes=c.nodes,
            strategy=c.strategy.text,
            micro_batch=c.run.training.micro_batch,
            checkpointing=c.run.model.checkpointing,
            tile_relations=c.run.tile_relations,
            step_s=c.seconds,
            device_bytes=c.bounds.device,
            settings=c.settings,
        )
        for c in chosen[::step]
    )
