"""The experiments: the paper's questions at desk size, with the models, training data and test data for each.

The models of an experiment share width, depth and schedule; only their operators differ, unless a name says otherwise.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pydantic import Field

from translution.planner.common import InputError, Schema, nearest
from translution.planner.config import DataKind, ModelSpec, override, parse_model_spec
from translution.planner.costs import count_parameters

BATCH = 64
"""Samples per step."""
_CANVAS: dict[str, Any] = {
    "family": "vit", "image": 24, "patch": 4, "channels": 1, "classes": 10, "dim": 32, "depth": 2, "heads": 2,
}  # fmt: skip
"""Canvas of 36 patches and 121 relations, for digits of 12 by 12 pixels."""
_BYTES: dict[str, Any] = {
    "family": "gpt", "context": 64, "vocabulary": 256, "dim": 64, "depth": 2, "heads": 2,
}  # fmt: skip
_POSITIONS: dict[str, dict[str, Any]] = {
    "attention, absolute positions": {"operator": "attention"},
    "attention, rotary": {"operator": "attention", "rotary": True},
    "attention, relative biases": {"operator": "bias"},
    "attention, relative vectors (Shaw)": {"operator": "shaw"},
    "α-Translution": {"operator": "alpha", "c1": 8, "c2": 8},
    "full Translution": {"operator": "translution"},
}
_LANGUAGE = ("attention, absolute positions", "attention, rotary", "α-Translution", "full Translution")
ROLES = ("qkv", "kv", "qv", "qk", "q", "k", "v")
"""Sets of projections with a matrix per relation that are compared."""
LOW_WIDTHS = (1, 2, 4, 8, 16)
"""Low-rank widths c1 = c2 that are compared."""


class ModelVariant(Schema):
    """A model of an experiment, with its display name."""

    name: str
    model: ModelSpec = Field(discriminator="family")


class Task(Schema):
    """The data that a model is trained on, and the data that it is tested on."""

    train: DataKind
    tests: tuple[DataKind, ...]


class Experiment(Schema):
    """A question, and the models and tasks that answer it."""

    name: str
    question: str
    metric: str
    """``accuracy`` on held-out samples, or ``bits per byte``."""
    variants: tuple[ModelVariant, ...]
    tasks: tuple[Task, ...]
    steps: int
    """Training steps of each model."""
    quick_steps: int
    """Training steps of each model in a quick run."""
    seeds: int = 3
    """Number of seeds for each model and task."""
    learning_rate: float = 2e-3
    """Peak learning rate."""


def _variants(base: dict[str, Any], models: dict[str, dict[str, Any]]) -> tuple[ModelVariant, ...]:
    return tuple(ModelVariant(name=name, model=parse_model_spec(base | own)) for name, own in models.items())


STATIC = Task(train="digits-static", tests=("digits-static", "digits-patches", "digits-shifted"))
DYNAMIC = Task(train="digits-shifted", tests=("digits-shifted",))


def _shift() -> Experiment:
    return Experiment(
        name="shift",
        question="Digits in the middle of a canvas, or anywhere on it: which way of encoding positions carries over?",
        metric="accuracy",
        variants=_variants(_CANVAS, _POSITIONS),
        tasks=(STATIC, DYNAMIC),
        steps=250,
        quick_steps=12,
    )


def _ablation() -> Experiment:
    """Compare with absolute matrices, also in a model widened until it has at least as many parameters."""
    relative = parse_model_spec(_CANVAS | {"operator": "translution"})
    wide, minimum = relative, count_parameters(relative).total
    while wide.operator != "absolute" or count_parameters(wide).total < minimum:
        wide = override(wide, operator="absolute", dim=wide.dim + (4 if wide.operator == "absolute" else 0))
    same = override(relative, operator="absolute")
    return Experiment(
        name="ablation",
        question="Is it the relations, or only the many parameters? A matrix per relation against one per position.",
        metric="accuracy",
        variants=(
            ModelVariant(name="relative matrices", model=relative),
            ModelVariant(name="absolute matrices, same width", model=same),
            ModelVariant(name=f"absolute matrices, width {wide.dim}", model=wide),
        ),
        tasks=(STATIC, DYNAMIC),
        steps=250,
        quick_steps=12,
    )


def _rank() -> Experiment:
    models: dict[str, dict[str, Any]] = {"attention, absolute positions": {"operator": "attention"}}
    models |= {f"α, c1 = c2 = {width}": {"operator": "alpha", "c1": width, "c2": width} for width in LOW_WIDTHS}
    models["full Translution"] = {"operator": "translution"}
    return Experiment(
        name="rank",
        question="How much of full Translution's accuracy do low-rank tables keep, and at how many parameters?",
        metric="accuracy",
        variants=_variants(_CANVAS, models),
        tasks=(DYNAMIC,),
        steps=250,
        quick_steps=12,
    )


def _roles() -> Experiment:
    return Experiment(
        name="roles",
        question="Which of queries, keys and values need a matrix per relation?",
        metric="accuracy",
        variants=_variants(_CANVAS, {f"relative {roles}": {"roles": roles} for roles in ROLES}),
        tasks=(DYNAMIC,),
        steps=250,
        quick_steps=12,
    )


def _language() -> Experiment:
    return Experiment(
        name="language",
        question="Byte by byte through the source of Python's library: what do relative matrices gain at equal layers?",
        metric="bits per byte",
        variants=_variants(_BYTES, {name: _POSITIONS[name] for name in _LANGUAGE}),
        tasks=(Task(train="stdlib", tests=("stdlib",)),),
        steps=250,
        quick_steps=6,
    )


_EXPERIMENTS: dict[str, Callable[[], Experiment]] = {
    "shift": _shift, "ablation": _ablation, "rank": _rank, "roles": _roles, "language": _language,
}  # fmt: skip
EXPERIMENT_NAMES = tuple(_EXPERIMENTS)


def find_experiment(name: str) -> Experiment:
    """Return an experiment by its name.

    Raises:
        InputError: if the name is not one of `EXPERIMENT_NAMES`.
    """
    if name not in _EXPERIMENTS:
        known = ", ".join(EXPERIMENT_NAMES)
        raise InputError(
            f"experiment: {name[:60]!r} is not allowed{nearest(name, EXPERIMENT_NAMES)}: must be one of {known}"
        )
    return _EXPERIMENTS[name]()
