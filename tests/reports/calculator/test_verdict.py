"""The verdict of a plan in figures, and two choices row by row."""

from __future__ import annotations

import pytest

from translution.planner.common import GIB
from translution.reports.calculator.choice import Choice
from translution.reports.calculator.result import Outcome, costs_of, search_choice
from translution.reports.calculator.verdict import Answer, compared_rows, plan_figures, status_line


def answer_of(choice: Choice) -> Answer:
    return Answer(choice, costs_of(choice), Outcome.model_validate_json(search_choice(choice).outcome))


@pytest.fixture(scope="module")
def full() -> Answer:
    return answer_of(Choice(model="vit-small/32", price=2.0))


def test_figures_are_those_of_the_plan(full: Answer) -> None:
    plan = full.outcome.plan
    assert plan is not None and plan.time is not None and plan.run is not None
    figures = {figure.key: figure for figure in plan_figures(plan)}
    device = plan.tiers[0]
    assert device.capacity_bytes is not None
    used, capacity = device.peak_bytes / GIB, device.capacity_bytes / GIB
    assert figures["memory"].text == f"{used:.1f} of {capacity:.1f} GiB"
    assert figures["time"].value == plan.time.likely_s
    assert figures["hours"].value == plan.run.gpu_hours
    assert figures["price"].value == pytest.approx(2 * plan.run.gpu_hours)
    assert "at 2 a GPU-hour" in figures["price"].detail
    host = plan.tiers[1].model_copy(update={"peak_bytes": 2**20, "capacity_bytes": 256 * GIB})
    little = {figure.key: figure for figure in plan_figures(plan.model_copy(update={"tiers": (device, host)}))}
    assert little["host"].text == "1.00 MiB of 256.0 GiB"
    assert status_line(full.outcome).startswith(f"Fits: {used:.1f} of {capacity:.1f} GiB, ")
    assert status_line(full.outcome).endswith("GPU-hours")
    without = answer_of(Choice(model="vit-small/32")).outcome.plan
    assert without is not None
    assert "price" not in {figure.key for figure in plan_figures(without)}


def test_two_choices_are_compared_where_they_differ(full: Answer) -> None:
    other = answer_of(Choice(model="vit-small/32", operator="attention", price=2.0))
    rows = {row.label: row for row in compared_rows(full, other)}
    assert (rows["Operator"].a, rows["Operator"].b) == ("full Translution", "attention")
    assert "Model" not in rows and "Price of a GPU-hour" not in rows
    first, second = (answer.costs.operators[0].parameters for answer in (full, other))
    assert rows["parameters"].times == pytest.approx(second / first)
    plans = full.outcome.plan, other.outcome.plan
    assert plans[0] and plans[1] and plans[0].time and plans[1].time
    assert rows["a step"].times == pytest.approx(plans[1].time.likely_s / plans[0].time.likely_s)
    assert rows["price of the run"].times == pytest.approx(rows["GPU-hours"].times)


def test_a_choice_that_does_not_fit_can_be_compared(full: Answer) -> None:
    small = answer_of(
        Choice(model="gpt-tiny/160", gpu="RTX4090", gpus=1, headroom=0.9, stage=2, offload="none", global_batch=1)
    )
    assert small.outcome.state == "nothing fits"
    rows = {row.label: row for row in compared_rows(small, full)}
    assert (rows["verdict"].a, rows["verdict"].b) == ("Does not fit", "Fits")
    assert (rows["a step"].a, rows["a step"].times) == ("–", None)
    searching = Answer(full.choice, full.costs, Outcome(state="searching"))
    assert {row.label: row for row in compared_rows(full, searching)}["verdict"].b == "Searching…"
    assert status_line(small.outcome) == "Does not fit"
    assert status_line(Outcome(state="busy", message="64 searches are waiting")) == "64 searches are waiting"
