"""`plan` finds the best plan of a model on a cluster, and explains it; `search_plan` does so for validated specs.

The explanation has a verdict for every strategy, a reason for every knob, and the Pareto front.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pydantic import Field

from ..common.errors import DoesNotFitError, InputError, nearest
from ..common.progress import OnProgress, ignore_progress
from ..common.schema import Schema, stored_as
from ..common.types import Positive
from ..common.units import format_bytes
from ..config.defaults import default_data, default_precision
from ..config.loading import load_model
from ..config.model import ModelSpec
from ..config.recipes import Recipe, find_recipe
from ..config.training import TrainingSpec, parse_training
from ..hardware.cluster import ClusterSpec, load_cluster
from ..plans.build import predict_plan
from ..plans.plan import Plan
from .advice import Advice, FixAdvisor, HybridRow
from .searcher import Candidate, Capacity, Searcher
from .space import SearchConstraints, Strategy, parse_constraints, resolve_global_batch

_TRAINING_FIELDS = tuple(TrainingSpec.model_fields)
_CONSTRAINT_FIELDS = tuple(SearchConstraints.model_fields)
_OTHER_NAMES = {"accumulation": "gradient_accumulation_steps"}


class NoPlanFits(DoesNotFitError):  # noqa: N818  # the name that users catch
    """No plan fits the cluster.

    Args:
        text: the error message, one line.
        strategies: every strategy that was tried, with the reason why it does not fit.
        advice: changes that make a plan fit, cheapest first.
        hybrids: hybrid models that fit.
    """

    def __init__(
        self,
        text: str,
        strategies: tuple[StrategyVerdict, ...],
        advice: tuple[Advice, ...],
        hybrids: tuple[HybridRow, ...],
    ) -> None:
        super().__init__(text)
        self.strategies, self.advice, self.hybrids = strategies, advice, hybrids


def plan(
    model: ModelSpec | Mapping[str, object] | str | Path,
    cluster: ClusterSpec | Mapping[str, object] | str | Path,
    /,
    *,
    recipe: str | None = None,
    samples: int | None = None,
    epochs: float | None = None,
    on_progress: OnProgress = ignore_progress,
    **settings: Any,
) -> SearchResult:
    """Find the best plan of a model on a cluster.

    Args:
        model: a spec, a preset name, a file or a mapping, as `load_model` takes it.
        cluster: a spec, a name, a file or a mapping, as `load_cluster` takes it.
        recipe: name of published settings, which the other arguments change: ``"translution-vit"`` or
            ``"translution-gpt"``.
        samples: samples of one epoch; with it the number of steps follows from ``epochs`` and the global batch.
        epochs: passes over ``samples``; the recipe's by default, or 1.
        on_progress: called while candidates are collected.
        settings: fields of `TrainingSpec` (``precision="bf16"``, ``steps=1000``, ``data="images"``; precision and data
            are those of `default_precision` and `default_data` unless given) and of `SearchConstraints`
            (``global_batch=512``, ``stage=3``, ``offload="cpu"``). ``micro_batch`` and ``gradient_accumulation_steps``
            fix what the search would choose; so does ``checkpointing``, which is the model's own unless that is "none".

    Returns:
        The chosen plan (``.plan``), a verdict for every strategy (``.strategies``), a reason for every knob
        (``.knobs``) and the Pareto front (``.pareto``).

    Raises:
        InputError: for an unknown name, a bad value, or constraints that contradict one another.
        NoPlanFits: if no plan fits; its ``advice`` says what would.
    """
    spec, where = load_model(model), load_cluster(cluster)
    named = {_OTHER_NAMES.get(name, name): value for name, value in settings.items()}
    for name in named:
        if name not in _TRAINING_FIELDS and name not in _CONSTRAINT_FIELDS:
            known = dict.fromkeys((*_CONSTRAINT_FIELDS, *_TRAINING_FIELDS))
            raise InputError(f"plan: unknown key {name!r}{nearest(name, known)}; allowed: {', '.join(known)}")
    fixed = {name: value for name, value in named.items() if name in _CONSTRAINT_FIELDS}
    fields = {name: value for name, value in named.items() if name not in _CONSTRAINT_FIELDS}
    used = None if recipe is None else find_recipe(recipe, spec)
    if used is not None and fixed.get("global_batch") is None:
        fixed["global_batch"] = used.global_batch
    if fixed.get("checkpointing") is None and spec.checkpointing != "none":
        fixed["checkpointing"] = spec.checkpointing
    constraints = parse_constraints(fixed, "plan")
    if "steps" in fields and (samples, epochs) != (None, None):
        name = "epochs" if samples is None else "samples"
        raise InputError(f"steps: {fields['steps']} is not allowed: must be left out with {name}, which sets them")
    if used is not None:
        fields = _recipe_fields(used, fields.get("data"), samples, epochs, constraints, where) | fields
    elif samples is not None:
        fields["steps"] = steps_for_epochs(samples, 1.0 if epochs is None else epochs, constraints, where)
    elif epochs is not None:
        raise InputError(f"epochs: {epochs} is not allowed: must be used with samples or a recipe")
    fields = {"precision": default_precision(where), "data": default_data(spec)} | fields
    training = parse_training(fields, "plan")
    return search_plan(spec, where, training, constraints, on_progress)


def _recipe_fields(
    recipe: Recipe,
    data: object,
    samples: int | None,
    epochs: float | None,
    constraints: SearchConstraints,
    cluster: ClusterSpec,
) -> dict[str, object]:
    """Fields of `TrainingSpec` by a recipe, whose epochs are of whole steps as in the authors' code."""
    epoch_steps = steps_for_epochs(recipe.samples if samples is None else samples, 1.0, constraints, cluster)
    passes = recipe.epochs if epochs is None else epochs
    if not 0 < passes < math.inf:
        raise InputError(f"epochs: {passes} is not allowed: must be above 0")
    return recipe.fields(epoch_steps, data) | {"steps": math.ceil(epoch_steps * passes)}


def steps_for_epochs(samples: int, epochs: float, constraints: SearchConstraints, cluster: ClusterSpec) -> int:
    """Optimizer steps that a number of epochs takes at the global batch of a search.

    Args:
        samples: samples of one epoch.
        epochs: passes over the samples.
        constraints: give the global batch.
        cluster: gives the number of ranks.

    Raises:
        InputError: if ``samples`` or ``epochs`` is not above 0.
    """
    for name, value in (("samples", samples), ("epochs", epochs)):
        if not 0 < value < math.inf:
            raise InputError(f"{name}: {value} is not allowed: must be above 0")
    return max(1, math.ceil(samples * epochs / resolve_global_batch(constraints, cluster)))


def search_plan(
    spec: ModelSpec,
    cluster: ClusterSpec,
    training: TrainingSpec,
    constraints: SearchConstraints | None = None,
    on_progress: OnProgress = ignore_progress,
) -> SearchResult:
    """Find the best plan of a model on a cluster, from validated specs.

    Args:
        spec: the model.
        cluster: all available nodes.
        training: precision, optimizer, data and steps; the search chooses micro-batch and accumulation.
        constraints: what the user fixes; by default nothing.
        on_progress: called while candidates are collected.

    Raises:
        InputError: if the constraints contradict one another, or the cluster lacks a rate.
        NoPlanFits: if no plan fits.
    """
    searcher = Searcher(spec, cluster, training, constraints or SearchConstraints(), on_progress)
    best = searcher.best()
    if best is not None:
        return explain(searcher, best)
    verdicts = strategy_verdicts(searcher, None)
    advisor = FixAdvisor(searcher)
    text = f"{spec.name} does not fit on {cluster.name}{_closest_reason(searcher, verdicts)}"
    raise NoPlanFits(text, verdicts, advisor.all(), advisor.hybrids())


def _closest_reason(searcher: Searcher, verdicts: tuple[StrategyVerdict, ...]) -> str:
    """Why the strategy that comes closest does not fit."""
    closest = min(searcher.closest.items(), key=lambda item: item[1].peak_utilization, default=None)
    if closest is not None:
        text = closest[0].text
        return f"; {text}: {next(verdict.reason for verdict in verdicts if verdict.strategy == text)}"
    if searcher.infeasible:
        strategy, reason = next(iter(searcher.infeasible.items()))
        return f"; {strategy.text}: {reason}"
    return f"; {verdicts[0].strategy}: {verdicts[0].reason}" if verdicts else ""


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


class SearchResult(Schema):
    """The chosen plan, the alternatives and the reasons."""

    plan: Plan
    considered: int
    """Number of candidates."""
    strategies: tuple[StrategyVerdict, ...] = stored_as("families")
    knobs: tuple[KnobReason, ...]
    pareto: tuple[ParetoPoint, ...]


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
            reason = f"fits: {other.seconds:.3g} s a step on {other.nodes} node(s)"
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
            reason = "a rank's partitions are below 1 MiB, and DeepSpeed writes nothing that small to NVMe"
            verdicts.append(StrategyVerdict(strategy=strategy.text, reason=reason))
    return tuple(verdicts)


_KNOBS: dict[str, Callable[[Candidate], object]] = {
    "nodes": lambda c: c.nodes,
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


def explain(searcher: Searcher, best: Candidate) -> SearchResult:
    """Build the search result of a chosen candidate.

    Args:
        searcher: the finished search.
        best: the candidate that it chose.
    """
    return SearchResult(
        plan=predict_plan(best.run),
        considered=searcher.considered,
        strategies=strategy_verdicts(searcher, best),
        knobs=knob_reasons(searcher, best),
        pareto=pareto(searcher),
    )
