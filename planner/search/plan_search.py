"""`plan` finds the best plan of a model on a cluster, and explains it; `search_plan` does so for validated specs.

The explanation has a verdict for every strategy, a reason for every knob, and the Pareto front.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..common.errors import DoesNotFitError, InputError, nearest
from ..common.progress import OnProgress, ignore_progress
from ..common.schema import Schema, stored_as
from ..config.defaults import default_data, default_precision
from ..config.loading import load_model
from ..config.model import ModelSpec
from ..config.recipes import Recipe, find_recipe
from ..config.training import TrainingSpec, parse_training
from ..hardware.cluster import ClusterSpec, load_cluster
from ..plans.build import predict_plan
from ..plans.plan import Plan
from .advice import Advice, FixAdvisor, HybridRow
from .candidate import Candidate
from .searcher import Searcher
from .space import SearchConstraints, parse_constraints, resolve_global_batch
from .verdicts import KnobReason, ParetoPoint, StrategyVerdict, knob_reasons, pareto, strategy_verdicts

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


class SearchResult(Schema):
    """The chosen plan, the alternatives and the reasons."""

    plan: Plan
    considered: int
    """Number of candidates."""
    strategies: tuple[StrategyVerdict, ...] = stored_as("families")
    knobs: tuple[KnobReason, ...]
    pareto: tuple[ParetoPoint, ...]


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
