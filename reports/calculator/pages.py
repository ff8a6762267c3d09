"""The HTML of the calculator: the page, and the parts that change with the choice."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import lru_cache
from importlib.resources import files
from urllib.parse import urlencode

from jinja2 import Environment, FunctionLoader, StrictUndefined

from translution.planner.common import format_bytes, format_count, format_flops
from translution.planner.plans import version
from translution.planner.search import ParetoPoint

from .charts import memory_chart, operator_chart, seconds_text, step_chart, trade_chart
from .choice import FIXED_FIELDS, INSTEAD, Choice, ChoiceError, cluster_of
from .form import CHECKPOINTING_WORDS, SETTING_WORDS, form_sections, value_text
from .result import PlanView
from .verdict import (
    COMPARE,
    FRONT_NODES,
    Answer,
    PageChoice,
    compared_rows,
    plan_figures,
    status_line,
    verdict_words,
)

PAPER = "https://arxiv.org/abs/2510.10060"


@lru_cache
def asset(name: str) -> str:
    """Return the text of a file of this package."""
    return (files(__package__) / name).read_text(encoding="utf-8")


def query_of(choice: Choice) -> str:
    """Return the shortest query of a choice; empty for the default."""
    return urlencode({name: value_text(value) for name, value in choice.changed.items()})


def page_query(choice: Choice, other: Choice | None = None, front_nodes: int | None = None) -> str:
    """Return the query of the page.

    Args:
        choice: the choice of the form.
        other: choice A of a comparison.
        front_nodes: nodes of the search from whose trade-off the choice was picked.
    """
    more = {}
    if other is not None:
        # The query of the default choice is empty, as if there were none.
        more[COMPARE] = query_of(other) or urlencode({"model": other.model})
    if front_nodes is not None:
        more[FRONT_NODES] = str(front_nodes)
    return "&".join(part for part in (query_of(choice), urlencode(more)) if part)


def free_choice(page: PageChoice) -> Choice:
    """Return the choice without what it fixes of the search: the trade-off is among the plans of its search."""
    choice = page.choice
    more = {} if choice.cluster_yaml or not page.front_nodes else {"nodes": max(page.front_nodes, choice.nodes)}
    return choice.replacing(**dict.fromkeys(FIXED_FIELDS), **more)


def point_choice(page: PageChoice, point: ParetoPoint) -> Choice | None:
    """Return the choice that has a Pareto-optimal plan as its result; None if the form cannot express it.

    Args:
        page: choice of the page.
        point: a plan of the search of `free_choice`.
    """
    base = free_choice(page)
    fixed = dict(point.settings)
    knobs = fixed.pop("zero_overrides", {})
    words = [f"{name}={str(value).lower()}" for name, value in knobs.items()]
    if not fixed or (base.cluster_yaml is not None and point.nodes != cluster_of(base).nodes):
        return None
    if base.cluster_yaml is None:
        fixed["nodes"] = point.nodes
    return base.replacing(**fixed, zero=",".join(words) or None)


def _point_query(page: PageChoice, point: ParetoPoint) -> str | None:
    choice = point_choice(page, point)
    if choice is None:
        return None
    nodes = free_choice(page).nodes
    return page_query(choice, page.other, nodes if nodes != choice.nodes else None)


def _with(page: PageChoice, changes: dict[str, object]) -> str | None:
    """Return the query of a choice after the changes of an advice; None if the form lacks a changed field."""
    fields = {name: value[0] if isinstance(value, list) else value for name, value in changes.items()}
    if not fields or not set(fields) <= set(Choice.model_fields):
        return None
    return page_query(page.choice.replacing(**fields), page.other)


@lru_cache
def _environment() -> Environment:
    environment = Environment(
        loader=FunctionLoader(asset), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    filters: dict[str, Callable[..., object]] = {
        "bytes": format_bytes,
        "count": format_count,
        "flops": format_flops,
        "seconds": seconds_text,
        "text": value_text,
        "config": lambda config: json.dumps(config, indent=2),
        "checkpointing": lambda name: CHECKPOINTING_WORDS.get(name, name),
        "setting": lambda name: SETTING_WORDS.get(name, name),
        "status": status_line,
        "verdict": verdict_words,
    }
    environment.filters |= filters
    environment.globals |= {
        "changed_query": _with,
        "compared_rows": compared_rows,
        "figures": plan_figures,
        "memory_chart": memory_chart,
        "operator_chart": operator_chart,
        "page_query": page_query,
        "point_query": _point_query,
        "step_chart": step_chart,
        "trade_chart": trade_chart,
    }
    return environment


def _values(page: PageChoice, answer: Answer | None, other: Answer | None, front: PlanView | None) -> dict[str, object]:
    outcome = None if answer is None else answer.outcome
    drawn = front or (None if outcome is None else outcome.plan)
    return {
        "page": page,
        "choice": page.choice,
        "answer": answer,
        "outcome": outcome,
        "costs": None if answer is None else answer.costs,
        "other": other,
        "points": () if drawn is None else drawn.pareto,
        "fixed": any(name in FIXED_FIELDS for name in page.choice.changed),
        "free_query": page_query(free_choice(page), page.other),
        "query": query_of(page.choice),
    }


def render_answer(page: PageChoice, answer: Answer, other: Answer | None = None, front: PlanView | None = None) -> str:
    """Return the parts of the page that change with the choice: verdict, plan and costs.

    Args:
        page: what the address asks for.
        answer: costs and outcome of its choice.
        other: costs and outcome of choice A of a comparison.
        front: plan of `free_choice`, whose trade-off is drawn; None draws that of the choice itself.
    """
    return _environment().get_template("calculator_answer.html.j2").render(_values(page, answer, other, front))


def render_page(
    page: PageChoice,
    answer: Answer | None,
    error: ChoiceError | None,
    other: Answer | None = None,
    front: PlanView | None = None,
) -> str:
    """Return the complete page.

    Args:
        page: choice that the form shows.
        answer: costs and outcome of the choice; None if it is rejected.
        error: error of a rejected choice.
        other: costs and outcome of choice A of a comparison.
        front: plan of `free_choice`, as for `render_answer`.
    """
    return _environment().get_template("calculator.html.j2").render(
        _values(page, answer, other, front),
        error=error,
        sections=form_sections(),
        default=Choice(),
        instead=INSTEAD,
        version=version(),
        paper=PAPER,
    )  # fmt: skip
