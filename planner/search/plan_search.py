"""From a model, a cluster and wishes to a plan with its reasons, or to what would do where none fits."""

from __future__ import annotations

import math

from ..common.errors import DoesNotFitError
from ..common.schema import Schema
from ..config.model import ModelSpec
from ..config.training import TrainingSpec
from ..hardware.cluster import ClusterSpec
from ..plans.plan import Plan
from ..timing.step_time import StepTime
from .advice import Advice, FixAdvisor, HybridRow
from .constraints import SearchConstraints
from .explain import SearchResult, StrategyVerdict, explain, strategy_verdicts
from .searcher import Searcher, resolve_global_batch


class NoPlanFits(DoesNotFitError):  # noqa: N818  # the name that users catch
    """No plan fits.

    Args:
        text: one line.
        families: what was tried, each with the reason against it.
        advice: what would do, the cheapest first.
        hybrids: models that would fit with some layers full.
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


class RunCost(Schema):
    """What a whole run takes."""

    steps: int
    samples: int
    low_s: float
    likely_s: float
    high_s: float
    gpu_hours: float
    price: float | None
    """At the cluster's price per GPU-hour; null where it has none."""


def run_cost(time: StepTime, cluster: ClusterSpec, training: TrainingSpec) -> RunCost:
    """What all steps of a plan take, at the likely time of one.

    Args:
        time: of a step.
        cluster: gives the ranks and the price.
        training: gives the steps.
    """
    hours = time.likely_s * training.steps * cluster.world_size / 3600
    price = cluster.price_per_gpu_hour
    return RunCost(
        steps=training.steps,
        samples=training.steps * training.global_batch(cluster.world_size),
        low_s=time.low_s * training.steps,
        likely_s=time.likely_s * training.steps,
        high_s=time.high_s * training.steps,
        gpu_hours=hours,
        price=None if price is None else price * hours,
    )


def steps_for_epochs(samples: int, epochs: float, constraints: SearchConstraints, cluster: ClusterSpec) -> int:
    """Optimizer steps of so many passes over so many samples, at the global batch of a search.

    Args:
        samples: of one epoch.
        epochs: passes.
        wishes: give the global batch.
        cluster: gives the ranks.
    """
    return max(1, math.ceil(samples * epochs / resolve_global_batch(constraints, cluster)))


def search_plan(
    spec: ModelSpec, cluster: ClusterSpec, training: TrainingSpec, constraints: SearchConstraints | None = None
) -> SearchResult:
    """The best plan, why it and why no other.

    Args:
        spec: the model.
        cluster: the nodes there are.
        training: precision, optimizer and steps; micro-batch and accumulation are chosen.
        wishes: what is decided already; nothing by default.

    Raises:
        InputError: if wishes contradict one another, or the cluster lacks a rate.
        NoPlanFits: if no plan fits.
    """
    searcher = Searcher(spec, cluster, training, constraints or SearchConstraints())
    best = searcher.best()
    if best is not None:
        return explain(searcher, best)
    strategies = strategy_verdicts(searcher, None)
    closest = min(searcher.closest.items(), key=lambda item: item[1].peak_utilization, default=None)
    reason = ""
    if closest is not None:
        text = closest[0].text
        reason = "; " + text + ": " + next(verdict.reason for verdict in strategies if verdict.strategy == text)
    elif searcher.infeasible:
        strategy, why = next(iter(searcher.infeasible.items()))
        reason = f"; {strategy.text}: {why}"
    elif strategies:
        reason = f"; {strategies[0].strategy}: {strategies[0].reason}"
    advisor = FixAdvisor(searcher)
    raise NoPlanFits(
        f"{spec.name} does not fit on {cluster.name}{reason}", strategies, advisor.all(), advisor.hybrids()
    )


def search(
    spec: ModelSpec, cluster: ClusterSpec, training: TrainingSpec, constraints: SearchConstraints | None = None
) -> Plan:
    """The best plan alone, for programs.

    Args:
        spec, cluster, training, wishes: as in `choose`.

    Raises:
        InputError: as `choose` does.
        NoPlanFits: if no plan fits.
    """
    return search_plan(spec, cluster, training, constraints).plan
