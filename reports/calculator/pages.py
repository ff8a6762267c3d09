"""The HTML of the calculator: the page, and the parts that change with the choice."""

from __future__ import annotations

import json
from functools import lru_cache
from importlib.resources import files
from urllib.parse import urlencode

from jinja2 import Environment, FunctionLoader, StrictUndefined

from translution.planner.common import format_bytes, format_count, format_flops
from translution.planner.plans import version

from .choice import Choice, ChoiceError
from .form import form_sections, value_text
from .result import Costs, Outcome


@lru_cache
def asset(name: str) -> str:
    """Return the text of a file of this package."""
    return (files(__package__) / name).read_text(encoding="utf-8")


def query_of(choice: Choice) -> str:
    """Return the shortest query of a choice; empty for the default."""
    return urlencode({name: value_text(value) for name, value in choice.changed.items()})


def _with(choice: Choice, changes: dict[str, object]) -> str | None:
    """Return the query of a choice after the changes of an advice; None if the form lacks a changed field."""
    fields = {name: value[0] if isinstance(value, list) else value for name, value in changes.items()}
    if not fields or not set(fields) <= set(Choice.model_fields):
        return None
    return query_of(choice.replacing(**fields))


def _seconds(value: float) -> str:
    if value < 1:
        return f"{1000 * value:.3g} ms"
    return f"{value:.3g} s" if value < 600 else f"{value / 3600:.3g} h"


@lru_cache
def _environment() -> Environment:
    environment = Environment(
        loader=FunctionLoader(asset), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "bytes": format_bytes,
        "count": format_count,
        "flops": format_flops,
        "seconds": _seconds,
        "text": value_text,
        "config": lambda config: json.dumps(config, indent=2),
    }
    environment.globals["changed_query"] = _with
    return environment


def render_plan(choice: Choice, outcome: Outcome) -> str:
    """Return the HTML of the plan, or of the state of the search.

    Args:
        choice: the choice.
        outcome: outcome of its search.
    """
    return _environment().get_template("calculator_plan.html.j2").render(
        choice=choice, outcome=outcome, query=query_of(choice)
    )  # fmt: skip


def render_answer(choice: Choice, costs: Costs, outcome: Outcome) -> str:
    """Return the HTML of the exact costs and the plan.

    Args:
        choice: the choice.
        costs: its costs.
        outcome: outcome of its search.
    """
    return _environment().get_template("calculator_answer.html.j2").render(
        choice=choice, costs=costs, outcome=outcome, query=query_of(choice)
    )  # fmt: skip


def render_page(choice: Choice, costs: Costs | None, outcome: Outcome | None, error: ChoiceError | None) -> str:
    """Return the complete page.

    Args:
        choice: choice that the form shows.
        costs: costs of the choice; None if it is rejected.
        outcome: outcome of its search; None if it is rejected.
        error: error of a rejected choice.
    """
    return _environment().get_template("calculator.html.j2").render(
        choice=choice,
        costs=costs,
        outcome=outcome,
        error=error,
        sections=form_sections(),
        default=Choice(),
        version=version(),
        query=query_of(choice),
    )  # fmt: skip
