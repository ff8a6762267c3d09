"""The verdict of a plan in figures, and two choices next to each other."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal
from urllib.parse import parse_qsl

from translution.planner.common import GIB, MIB, TIB, Tier, format_bytes, format_count

from .charts import seconds_text
from .choice import FIELDS, Choice, ChoiceError, parse_choice
from .form import FormField, form_sections, value_text
from .result import Costs, Outcome, PlanView, TierUse

COMPARE = "compare"
"""Key of the page's address that holds the query of choice A; the rest of the address is choice B."""
FRONT_NODES = "front_nodes"
"""Key that holds the number of nodes of the search from whose trade-off a plan was picked."""


@dataclass(frozen=True, slots=True)
class PageChoice:
    """What an address asks for."""

    choice: Choice
    other: Choice | None = None
    """Choice A of a comparison."""
    front_nodes: int | None = None


@dataclass(frozen=True, slots=True)
class Answer:
    """A choice with its costs and the outcome of its search."""

    choice: Choice
    costs: Costs
    outcome: Outcome


@dataclass(frozen=True, slots=True)
class VerdictFigure:
    """One figure of a verdict."""

    key: Literal["memory", "host", "time", "hours", "price"]
    label: str
    text: str
    detail: str = ""
    value: float | None = None
    """The number, in bytes, seconds, GPU-hours or the price's currency."""


@dataclass(frozen=True, slots=True)
class ComparedRow:
    """One row of two choices."""

    label: str
    a: str
    b: str
    times: float | None = None
    """B as a multiple of A."""


def parse_page(pairs: Iterable[tuple[str, str]]) -> PageChoice:
    """Parse the page's address.

    Raises:
        ChoiceError: if a field of either choice is invalid.
    """
    more = {COMPARE: "", FRONT_NODES: ""}
    rest = []
    for name, value in pairs:
        if name in more:
            if more[name]:
                raise ChoiceError(f"{name}: is given twice", None)
            more[name] = value.strip()
        else:
            rest.append((name, value))
    choice, other = parse_choice(rest), None
    if more[COMPARE]:
        try:
            other = parse_choice(parse_qsl(more[COMPARE].removeprefix("?"), keep_blank_values=True))
        except ChoiceError as error:
            raise ChoiceError(f"{COMPARE}: {error.message}", None) from None
    nodes = more[FRONT_NODES]
    front_nodes = int(nodes) if nodes.isascii() and nodes.isdigit() and len(nodes) <= 6 else None
    return PageChoice(choice, other, front_nodes)


def _of_capacity(used: int, capacity: int | None) -> str:
    size = max(used, capacity or 0)
    unit, name = next(((unit, name) for unit, name in ((TIB, "TiB"), (GIB, "GiB")) if size >= unit), (MIB, "MiB"))
    if capacity is None:
        return f"{used / unit:,.1f} {name}"
    if used < unit / 20:
        return f"{format_bytes(used)} of {capacity / unit:,.1f} {name}"
    return f"{used / unit:,.1f} of {capacity / unit:,.1f} {name}"


def hours_text(hours: float) -> str:
    """Return a number of hours with three digits."""
    return f"{hours:,.0f}" if hours >= 100 else f"{hours:.3g}"


def plan_figures(plan: PlanView) -> tuple[VerdictFigure, ...]:
    """Return the figures of a plan: memory, time of a step, GPU-hours and price."""
    found = [_memory(tier) for tier in plan.tiers]
    if plan.time is not None:
        time = plan.time
        speed = f"{time.samples_per_s:,.0f}" if time.samples_per_s >= 1000 else f"{time.samples_per_s:.3g}"
        found.append(
            VerdictFigure(
                "time",
                "a step",
                seconds_text(time.likely_s),
                f"{seconds_text(time.low_s)} to {seconds_text(time.high_s)}; {speed} samples a second",
                time.likely_s,
            )
        )
    if plan.run is not None:
        run = plan.run
        detail = f"{seconds_text(run.likely_s)} on {plan.ranks:,} GPUs for {run.steps:,} steps"
        found.append(VerdictFigure("hours", "GPU-hours", hours_text(run.gpu_hours), detail, run.gpu_hours))
        if run.price is not None:
            price = f"{run.price:,.0f}" if run.price >= 100 else f"{run.price:,.2f}"
            found.append(
                VerdictFigure(
                    "price", "price of the run", price, f"at {run.price / run.gpu_hours:.4g} a GPU-hour", run.price
                )
            )
    return tuple(found)


def _memory(tier: TierUse) -> VerdictFigure:
    share = f"{100 * tier.peak_bytes / tier.capacity_bytes:.0f}% used" if tier.capacity_bytes else "capacity unknown"
    text = _of_capacity(tier.peak_bytes, tier.capacity_bytes)
    if tier.tier == Tier.DEVICE:
        return VerdictFigure("memory", "memory of each GPU", text, f"{share}, peak in {tier.phase}", tier.peak_bytes)
    where = {Tier.HOST: "host memory", Tier.PINNED: "pinned host memory", Tier.NVME: "NVMe"}[tier.tier]
    return VerdictFigure(
        "host", f"{where} of each GPU's process", text, f"{share}, peak in {tier.phase}", tier.peak_bytes
    )


def verdict_words(outcome: Outcome) -> str:
    """Return the verdict in a word or two."""
    words = {
        "found": "Fits",
        "nothing fits": "Does not fit",
        "searching": "Searching…",
        "busy": "The server is busy",
        "refused": "Not possible",
        "stopped": "The search was stopped",
    }
    return words[outcome.state]


def status_line(outcome: Outcome) -> str:
    """Return the line for the page's status: the verdict with its most important figures."""
    if outcome.plan is None:
        return outcome.message if outcome.state in ("busy", "stopped", "refused") else verdict_words(outcome)
    figures = [figure for figure in plan_figures(outcome.plan) if figure.key in ("memory", "time", "hours")]
    words = {"memory": "", "time": " a step", "hours": " GPU-hours"}
    return f"Fits: {', '.join(figure.text + words[figure.key] for figure in figures)}"


def compared_rows(a: Answer, b: Answer) -> tuple[ComparedRow, ...]:
    """Return two choices row by row: first the fields in which they differ, then their figures."""
    fields = {field.name: field for part in form_sections() for field in (*part.fields, *part.more, *part.own)}
    rows = [
        ComparedRow(fields[name].label, _value(a.choice, fields[name]), _value(b.choice, fields[name]))
        for name in FIELDS
        if getattr(a.choice, name) != getattr(b.choice, name)
    ]
    first, second = a.costs.operators[0].parameters, b.costs.operators[0].parameters
    rows.append(ComparedRow("parameters", format_count(first), format_count(second), second / first))
    rows.append(ComparedRow("verdict", verdict_words(a.outcome), verdict_words(b.outcome)))
    plans = a.outcome.plan, b.outcome.plan
    rows.append(ComparedRow("plan", _plan_words(plans[0]), _plan_words(plans[1])))
    figures = [{f.label: f for f in plan_figures(plan)} if plan is not None else {} for plan in plans]
    for label in dict.fromkeys((*figures[0], *figures[1])):
        one, two = (found.get(label) for found in figures)
        times = two.value / one.value if one and two and one.value and two.value else None
        rows.append(ComparedRow(label, one.text if one else "–", two.text if two else "–", times))
    return tuple(rows)


def _value(choice: Choice, field: FormField) -> str:
    value = getattr(choice, field.name)
    if field.kind == "textarea":
        return "none" if value is None else "pasted"
    if isinstance(value, bool):
        return "yes" if value else "no"
    text = value_text(value)
    return dict(field.options).get(text, text) or field.placeholder


def _plan_words(plan: PlanView | None) -> str:
    if plan is None:
        return "–"
    return f"{plan.strategy}, {plan.nodes} node{'s' if plan.nodes != 1 else ''}"
