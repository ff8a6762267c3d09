"""The largest full Translution of a ladder of depths that this machine trains, planned for what it has.

A model whose plan fits but whose steps would take longer than the time of this part is reported and not run. If the
chosen one fails, the next smaller one is tried.
"""

from __future__ import annotations

import json
import time
from typing import Any

from translution.planner import NoPlanFits, Plan, load_model
from translution.planner import plan as search
from translution.planner.common import format_bytes, format_count
from translution.planner.costs import count_parameters
from translution.planner.hardware import ClusterSpec, MeasuredRates

from .machine import Context, this_machine
from .rank import RankRun, run_plan
from .results import read_json

STEPS = 20
LEARNING_RATE = 3e-4
_START_SECONDS = 20.0
"""Seconds that a rank needs before its first step, besides what grows with the model."""
_PIN_BYTES_PER_SECOND = 2.5e9
"""Rate at which a driver pins host memory; an estimate, not measured."""
_LADDER = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12)
_SMALL_LADDER = (1, 2)


def _model(depth: int, context: Context) -> Any:
    if context.small:
        return load_model("vit-tiny/56", depth=depth, dim=32, heads=2)
    return load_model("vit-base/16", depth=depth)


def predicted_seconds(plan: Plan) -> float:
    """Return the seconds that a plan's process takes by the prediction: start, host memory, all steps."""
    step = plan.time.likely_s if plan.time is not None else 0.0
    return _START_SECONDS + plan.prediction.host_bytes / _PIN_BYTES_PER_SECOND + STEPS * step


def climb(cluster: ClusterSpec, context: Context) -> list[Plan]:
    """Return the best plan of each depth that fits, ascending; report each depth."""
    plans: list[Plan] = []
    for depth in _SMALL_LADDER if context.small else _LADDER:
        spec = _model(depth, context)
        row: dict[str, Any] = {"depth": depth, "parameters": count_parameters(spec).total, "fits": False, "reason": ""}
        try:
            dtype = "bf16" if context.device == "cuda" else "fp32"
            found = search(spec, cluster, precision=dtype, data="synthetic", steps=STEPS, learning_rate=LEARNING_RATE)
        except NoPlanFits as error:
            context.result.add("ladder", row | {"reason": str(error)[:300]})
            return plans
        plan = found.plan
        plans.append(plan)
        row |= {
            "fits": True,
            "stage": plan.zero.stage,
            "offload": f"{plan.zero.offload_optimizer.device}/{plan.zero.offload_param.device}",
            "micro_batch": plan.training.micro_batch,
            "predicted_seconds": predicted_seconds(plan),
            "predicted_device_bytes": plan.prediction.peak_bytes,
            "predicted_host_bytes": plan.prediction.host_bytes,
        }
        context.result.add("ladder", row)
        context.result.note(json.dumps(row))
    return plans


def train_largest(context: Context) -> None:
    """Plan the ladder, and train the largest model that fits and that the time suffices for.

    Raises:
        SystemExit: if none trained all its steps, or the loss did not fall.
    """
    began = time.monotonic()
    cluster = this_machine(context.device)
    if rates := read_json(context.out / "times.json").get("data", {}).get("rates"):
        cluster = cluster.model_copy(update={"measured": MeasuredRates.model_validate(rates)})
    plans = climb(cluster, context)
    for plan in reversed(plans):
        left = context.seconds - (time.monotonic() - began) - 3
        if not context.small and predicted_seconds(plan) > left and plan is not plans[0]:
            continue
        run = run_plan(plan, context, fixed=True, seconds=max(left, 5.0))
        row = _row(plan, run)
        context.result.add("runs", row)
        context.result.note(json.dumps(row))
        if run.step_seconds:
            context.result.say(_line(row))
        if not run.error:
            if not row["fell"]:
                raise SystemExit(f"the loss did not fall: {row['first_loss']} to {row['last_loss']}")
            return
    raise SystemExit("no model trained" if plans else "no model fits this machine")


def _row(plan: Plan, run: RankRun) -> dict[str, Any]:
    """Return the figures of a run."""
    counted = sorted(run.step_seconds[3:] or run.step_seconds)
    step = counted[len(counted) // 2] if counted else None
    measured = run.measurement
    return {
        "depth": plan.model.depth,
        "parameters": count_parameters(plan.model).total,
        "stage": plan.zero.stage,
        "global_batch": plan.global_batch,
        "steps": len(run.step_seconds),
        "step_seconds": step,
        "predicted_step_seconds": None if plan.time is None else plan.time.likely_s,
        "samples_per_s": None if step is None else plan.global_batch / step,
        "first_step_seconds": run.first_step_seconds,
        "process_seconds": run.seconds,
        "predicted_device_bytes": plan.prediction.peak_bytes,
        "allocated_bytes": None if measured is None else measured.peak_bytes,
        "reserved_bytes": None if measured is None else measured.reserved_bytes,
        "device_used_bytes": None if measured is None else measured.device_used_bytes,
        "process_peak_bytes": None if measured is None else measured.process_peak_bytes,
        "first_loss": run.losses[0] if run.losses else None,
        "last_loss": run.losses[-1] if run.losses else None,
        "fell": len(run.losses) == plan.training.steps and run.losses[-1] < run.losses[0],
        "error": run.error,
    }


def _line(row: dict[str, Any]) -> str:
    size = row["allocated_bytes"]
    memory = "" if size is None else f", {format_bytes(size)} allocated"
    return (
        f"depth {row['depth']}, {format_count(row['parameters'])} parameters, {row['samples_per_s']:.3g} samples/s"
        f"{memory}, loss {row['first_loss']:.3f} to {row['last_loss']:.3f} in {row['steps']} steps"
    )
