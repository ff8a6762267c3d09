"""The plan folder: ``plan.json``, ``ds_config.json``, ``launch.sh`` and a README for people."""

from __future__ import annotations

import json
from pathlib import Path

from .files import new_folder
from .flops import count_flops
from .memory import PHASES
from .parameters import count_parameters
from .plan import PLAN_FILE, Plan
from .units import format_bytes, format_count, format_flops

RUNS = "runs"

_LAUNCH = """#!/bin/sh
# Runs the plan of this folder. Arguments are passed on: try ./launch.sh --dry-run
set -eu
here=$(cd "$(dirname "$0")" && pwd)
exec translution launch "$here" "$@"
"""


def memory_table(plan: Plan) -> str:
    """The predicted memory of a rank as Markdown: phases by tiers, and each tier's worst moment."""
    prediction = plan.prediction
    tiers = prediction.tiers
    lines = [f"| phase | {' | '.join(tiers)} |", f"|---|{'--:|' * len(tiers)}"]
    for phase in PHASES:
        lines.append(f"| {phase} | {' | '.join(format_bytes(prediction.bytes_of(phase, tier)) for tier in tiers)} |")
    for tier in tiers:
        worst = max((peak for peak in prediction.peaks if peak.tier == tier), key=lambda peak: peak.bytes)
        lines += ["", f"### {tier}: {format_bytes(worst.bytes)} in {worst.phase}, at {worst.moment}", ""]
        lines += ["| what | bytes | | how it is counted | source |", "|---|--:|--:|---|---|"]
        for entry in worst.entries:
            size = f"{entry.bytes} | {format_bytes(entry.bytes)}"
            lines.append(f"| {entry.name} | {size} | {entry.formula} | {entry.source} |")
        lines.append(f"| **together** | {worst.bytes} | {format_bytes(worst.bytes)} | | |")
    return "\n".join(lines)


def folder_readme(plan: Plan) -> str:
    """The README of a plan folder."""
    model, training, cluster = plan.model, plan.training, plan.cluster
    flops = count_flops(model)
    tile = "whole tables" if plan.tile_relations is None else f"{plan.tile_relations} relations per tile"
    return f"""# Plan: {model.name} on {cluster.name}

Made by {plan.made_by}. {model.family} with {format_count(count_parameters(model).total)} parameters
({model.operator}, {tile}), {cluster.nodes} node(s) of {cluster.ranks_per_node} rank(s) on {cluster.device},
ZeRO-{plan.zero.stage}, {training.precision}, {training.micro_batch} samples per rank and micro-batch,
{training.global_batch(cluster.ranks)} per step, {training.steps} steps,
{format_flops(flops.training_step * training.global_batch(cluster.ranks))} of matrix products per step.

## Run it

    ./launch.sh              # or: translution launch FOLDER
    ./launch.sh --dry-run    # prints the DeepSpeed command and starts nothing
    translution verify {RUNS}/001

Each run gets its own folder under `{RUNS}/` with metrics, logs, measured memory and a checkpoint.

## Files

- `{PLAN_FILE}` the whole plan; the ranks read only this
- `ds_config.json` the DeepSpeed configuration in it, for use with your own training script
- `launch.sh` starts the run

## Predicted memory of one rank

{memory_table(plan)}

The device of a rank has {format_bytes(cluster.device_memory_bytes)}. Not counted: the process itself
(libraries, and on a GPU the CUDA context) and the data set.
"""


def write_plan_folder(plan: Plan, target: Path, *, force: bool = False) -> None:
    """Write a plan folder whole, or nothing.

    Args:
        plan: what to write.
        target: the folder to make.
        force: write into an existing plan folder; its runs stay as they are.

    Raises:
        InputError: if it exists and force is false, is no plan folder, or cannot be written.
    """
    with new_folder(target, marker=PLAN_FILE, force=force) as folder:
        (folder / PLAN_FILE).write_text(plan.model_dump_json(indent=2) + "\n", encoding="utf-8")
        config = json.dumps(plan.deepspeed_config(), indent=2)
        (folder / "ds_config.json").write_text(config + "\n", encoding="utf-8")
        (folder / "README.md").write_text(folder_readme(plan), encoding="utf-8")
        script = folder / "launch.sh"
        script.write_text(_LAUNCH, encoding="utf-8")
        script.chmod(0o755)
