"""The machine's rates, as `translution calibrate` measures them, and the times of steps that follow from them."""

from __future__ import annotations

import json
from typing import Any

from translution.distributed.calibration import calibrate
from translution.planner.common import TranslutionError
from translution.planner.hardware import ClusterSpec
from translution.planner.plans import Plan

from .machine import Context, this_machine
from .memory import Case, cases, precision
from .results import read_json


def measure_times(context: Context) -> None:
    """Measure the rates; compare predicted times of the plans with those that the memory part measured."""
    cluster = this_machine(context.device)
    command = "python scripts/gpu_check.py --parts times"
    rates = calibrate(cluster, None, command, context.result.note, quick=context.small)
    context.result.put(rates=rates.model_dump(mode="json", exclude_none=True))
    measured = {row["name"]: row for row in read_json(context.out / "memory.json").get("data", {}).get("plans", [])}
    calibrated = cluster.model_copy(update={"measured": rates})
    for case in cases(context):
        row = compare_case(case, (cluster, calibrated), precision(context), measured.get(case.name, {}))
        context.result.add("plans", row)
        context.result.note(json.dumps(row))
    known = [row for row in context.result.data["plans"] if row["step_seconds"] and row["calibrated_s"]]
    if not known:
        context.result.say("rates measured; no steps to compare with")
        return
    ratios = [row["calibrated_s"][0] / row["step_seconds"] for row in known]
    context.result.say(f"predicted with the rates / measured {min(ratios):.2f} to {max(ratios):.2f}")


def compare_case(
    case: Case, clusters: tuple[ClusterSpec, ClusterSpec], dtype: str, measured: dict[str, Any]
) -> dict[str, Any]:
    """Return the step time of one plan: likely, low and high from the catalog and from the rates, and measured."""
    row: dict[str, Any] = {"name": case.name, "step_seconds": measured.get("step_seconds"), "error": ""}
    row |= {name: measured.get(name) for name in ("fastest_seconds", "slowest_seconds")}
    for name, cluster in zip(("catalog_s", "calibrated_s"), clusters, strict=True):
        try:
            row[name] = _interval(case.plan(cluster, dtype))
        except TranslutionError as error:
            row |= {name: None, "error": str(error)}
    return row


def _interval(plan: Plan) -> list[float] | None:
    time = plan.time
    return None if time is None else [time.likely_s, time.low_s, time.high_s]
