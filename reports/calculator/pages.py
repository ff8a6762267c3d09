"""The calculator's page, and the parts of it that change with the choice, as HTML."""

from __future__ import annotations

import json
from functools import lru_cache
from importlib.resources import files
from urllib.parse import urlencode

from jinja2 import Environment, FunctionLoader, StrictUndefined

from translution.planner.common.units import format_bytes, format_count, format_flops
from translution.planner.plans.plan import version

from .choice import Choice, ChoiceError
from .form import form_sections, value_text
from .result import Costs, Outcome


@lru_cache
def asset(name: str) -> str:
    """A file of this package."""
    return (files(__package__) / name).read_text(encoding="utf-8")


def query_of(choice: Choice) -> str:
    """The shortest query that means a choice; empty for the default."""
    return urlencode({name: value_text(value) for name, value in choice.changed.items()})


def _with(choice: Choice, changes: dict[str, object]) -> str | None:
    """The query of a choice with what an advice changes; None if the form has no such field."""
    fields = {name: value[0] if isinstance(value, list) else value for name, value in changes.items()}
    if not fields or not set(fields) <= set(Choice.model_fields):
        return None
    return query_of(choice.but(**fields))


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
    """What the search found, or how far it is.

    Args:
        choice: what was asked.
        outcome: of its search.
    """
    return _environment().get_template("calculator_plan.html.j2").render(
        choice=choice, outcome=outcome, query=query_of(choice)
    )  # fmt: skip


def render_answer(choice: Choice, costs: Costs, outcome: Outcome) -> str:
    """Exact costs and what the search found.

    Args:
        choice: what was asked.
        costs: of it.
        outcome: of its search.
    """
    return _environment().get_template("calculator_answer.html.j2").render(
        choice=choice, costs=costs, outcome=outcome, query=query_of(choice)
    )  # fmt: skip


def render_page(choice: Choice, costs: Costs | None, outcome: Outcome | None, error: ChoiceError | None) -> str:
    """The whole page.

    Args:
        choice: what the form shows.
        costs: of the choice; None where it is refused.
        outcome: of its search; likewise.
        error: why it is refused.
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
