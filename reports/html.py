"""A report as one HTML page that holds all it needs, and asks no network for anything."""

from __future__ import annotations

import base64
import hashlib
from importlib.resources import files
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup

from translution.planner.provenance import Provenance
from translution.planner.units import format_bytes

from . import vega
from .plan_report import PlanReport

_LIVE = vega.config("currentColor", "var(--line)", "var(--page)", legend_columns=4)
"""The page's own colours, so that charts turn dark and light with it."""


def _read(name: str) -> str:
    return (files(__package__) / name).read_text(encoding="utf-8")


def _environment() -> Environment:
    environment = Environment(
        loader=FunctionLoader(_read), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["bytes"] = format_bytes
    return environment


def _source(script: str) -> str:
    """What the page's policy calls a script that may run; nothing else in the page can."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def _figure(key: str, spec: dict[str, Any]) -> dict[str, Any]:
    still = base64.b64encode(vega.png(spec, scale=1.5)).decode()
    return {"key": key, "spec": spec, "png": still, "description": spec["description"]}


def render(report: PlanReport, made: Provenance) -> str:
    """The page.

    Args:
        report: its content.
        made: where its figures come from.
    """
    scripts = [vega.javascript(), _read("report.js")]
    policy = (
        "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; "
        f"script-src {' '.join(map(_source, scripts))}"
    )
    specs = report.timelines.items()
    template = _environment().get_template("report.html.j2")
    return template.render(
        report=report,
        made=made,
        figures={tier: _figure(f"timeline-{number}", spec) for number, (tier, spec) in enumerate(specs)},
        curve=None if report.run is None or report.run.curve is None else _figure("curve", report.run.curve),
        config=_LIVE,
        style=Markup(_read("report.css")),
        scripts=[Markup(script) for script in scripts],
        policy=policy,
    )
