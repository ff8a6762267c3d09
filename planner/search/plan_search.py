"""`plan` finds the best plan of a model on a cluster, with its reasons; `search_plan` does so for validated specs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from ..common.errors import DoesNotFitError, InputError, nearest
from ..common.schema import validate
from ..config.loading import load_model
from ..config.model import ModelSpec
from ..config.training import TrainingSpec, parse_training
from ..hardware.cluster import ClusterSpec, load_cluster
from .advice import Advice, FixAdvisor, HybridRow
from .constraints import SearchConstraints, resolve_global_batch
from .explain import SearchResult, StrategyVerdict, explain, strategy_verdicts
from .searcher import Searcher

_CONSTRAINTS: TypeAdapter[SearchConstraints] = TypeAdapter(SearchConstraints)
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
    samples: int | None = None,
    epochs: float = 1.0,
    **settings: Any,
) -> SearchResult:
    """Find the best plan of a model on a cluster.

    Args:
        model: a spec, a preset name, a file or a mapping, as `load_model` takes it.
        cluster: a spec, a name, a file or a mapping, as `load_cluster` takes it.
        samples: samples of one epoch; with it the number of steps follows from ``epochs`` and the global batch.
        epochs: passes over ``samples``.
        settings: fields of `TrainingSpec` (``precision="bf16"``, ``steps=1000``, ``data="images"``; the data is
            ``"synthetic"`` unless given) and of `SearchConstraints` (``global_batch=512``, ``stage=3``,
            ``offload="cpu"``). ``micro_batch`` and ``gradient_accumulation_steps`` fix what the search would choose;
            so does ``checkpointing``, which is the model's own unless that is "none".

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
    if fixed.get("checkpointing") is None and spec.checkpointing != "none":
        fixed["checkpointing"] = spec.checkpointing
    constraints = validate(_CONSTRAINTS, fixed, "plan", _CONSTRAINT_FIELDS)
    training = parse_training({"data": "synthetic"} | fields, "plan")
    if samples is not None:
        steps = steps_for_epochs(samples, epochs, constraints, where)
        training = parse_training(training.model_dump() | {"steps": steps}, "plan")
    return search_plan(spec, where, training, constraints)


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
        if not value > 0:
            raise InputError(f"{name}: {value} is not allowed: must be above 0")
    return max(1, math.ceil(samples * epochs / resolve_global_batch(constraints, cluster)))


def search_plan(
    spec: ModelSpec, cluster: ClusterSpec, training: TrainingSpec, constraints: SearchConstraints | None = None
) -> SearchResult:
    """Find the best plan of a model on a cluster, from validated specs.

    Args:
        spec: the model.
        cluster: all available nodes.
        training: precision, optimizer, data and steps; the search chooses micro-batch and accumulation.
        constraints: what the user fixes; by default nothing.

    Raises:
        InputError: if the constraints contradict one another, or the cluster lacks a rate.
        NoPlanFits: if no plan fits.
    """
    searcher = Searcher(spec, cluster, training, constraints or SearchConstraints())
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
