"""Writes the plan folder: ``plan.json``, ``ds_config.json``, launch scripts and a README."""

from __future__ import annotations

import json
from pathlib import Path

from ..common.files import new_folder
from ..common.phases import Phase
from ..common.units import format_bytes, format_count, format_flops
from ..costs.flops import count_flops
from ..costs.parameters import count_parameters
from .launch_scripts import launch_files
from .plan import PLAN_FILE, Plan

RUNS = "runs"

_LAUNCH = """#!/bin/sh
# Runs the plan in this folder. Arguments are passed on: try ./launch.sh --dry-run
set -eu
here=$(cd "$(dirname "$0")" && pwd)
exec translution launch "$here" "$@"
"""


def memory_table(plan: Plan) -> str:
    """Return the predicted memory of a rank as Markdown: peaks by phase and tier, then each tier's highest peak."""
    prediction = plan.prediction
    tiers = prediction.tiers
    lines = [f"| phase | {' | '.join(tiers)} |", f"|---|{'--:|' * len(tiers)}"]
    for phase in Phase:
        lines.append(f"| {phase} | {' | '.join(format_bytes(prediction.bytes_of(phase, tier)) for tier in tiers)} |")
    for tier in tiers:
        worst = prediction.worst(tier)
        assert worst is not None
        lines += ["", f"### {tier}: {format_bytes(worst.bytes)} in {worst.phase}, at {worst.site}", ""]
        lines += ["| what | bytes | | how it is counted | source |", "|---|--:|--:|---|---|"]
        for entry in worst.breakdown:
            size = f"{entry.bytes} | {format_bytes(entry.bytes)}"
            lines.append(f"| {entry.name} | {size} | {entry.formula} | {entry.source} |")
        lines.append(f"| **total** | {worst.bytes} | {format_bytes(worst.bytes)} | | |")
    return "\n".join(lines)


def time_table(plan: Plan) -> str:
    """Return the predicted time of a step as Markdown; an empty text if the cluster lacks a rate."""
    time = plan.time
    if time is None:
        return ""
    lines = [
        "",
        "## Predicted time of a step",
        "",
        "| part | seconds | from | to | waits for |",
        "|---|--:|--:|--:|---|",
    ]
    for entry in time.breakdown:
        beside = ", overlaps computation" if entry.overlaps else ""
        figures = f"{entry.likely_s:.3g} | {entry.low_s:.3g} | {entry.high_s:.3g}"
        lines.append(f"| {entry.name} | {figures} | {entry.bound}{beside} |")
    lines.append(f"| **step** | {time.likely_s:.3g} | {time.low_s:.3g} | {time.high_s:.3g} | {time.bound} |")
    lines += ["", f"{time.samples_per_s:.3g} samples per second, {time.mfu:.1%} of the devices' peak."]
    return "\n".join(lines) + "\n"


def folder_readme(plan: Plan) -> str:
    """Return the README of a plan folder."""
    model, training, cluster = plan.model, plan.training, plan.cluster
    flops = count_flops(model)
    several, script, command = "", "launch.sh", "launch FOLDER"
    if cluster.nodes > 1:
        several = ", `launch-ssh.sh` on the hosts that `hostfile` names"
        script, command = "launch-ssh.sh", "launch FOLDER --hostfile FOLDER/hostfile"
    tile = "whole tables" if plan.tile_relations is None else f"{plan.tile_relations} relations per tile"
    return f"""# Plan: {model.name} on {cluster.name}

Made by {plan.made_by}. {model.family} with {format_count(count_parameters(model).total)} parameters
({model.operator}, {tile}), {cluster.nodes} node(s) of {cluster.ranks_per_node} rank(s) on {cluster.device},
ZeRO-{plan.zero.stage}, {training.precision}, {training.micro_batch} samples per rank and micro-batch,
{training.global_batch(cluster.world_size)} per step, {training.steps} steps,
{format_flops(flops.training_step * training.global_batch(cluster.world_size))} of matrix products per step.

## Run it

    ./{script}              # or: translution {command}
    ./{script} --dry-run    # prints the DeepSpeed command and starts nothing
    translution verify {RUNS}/001

Each run gets its own folder under `{RUNS}/` with metrics, logs, measured memory and a checkpoint.

## Files

- `{PLAN_FILE}` the complete plan, the only file that the ranks read
- `ds_config.json` its DeepSpeed configuration, for your own training script
- `launch.sh` starts the run on one node{several}
- `launch-torchrun.sh` starts it through torchrun, `job.sbatch` through Slurm
- `environment.sh` environment variables of every rank

## Predicted memory of one rank

{memory_table(plan)}

The device of a rank has {format_bytes(cluster.device_memory_bytes)}. The libraries of the process and the data set
are not counted.
{time_table(plan)}"""


def write_plan_folder(plan: Plan, target: Path, *, force: bool = False) -> None:
    """Write a complete plan folder, or nothing.

    Args:
        plan: the plan.
        target: the folder to create.
        force: write into an existing plan folder; its runs stay as they are.

    Raises:
        InputError: if the folder exists and ``force`` is false, is no plan folder, or cannot be written.
    """
    with new_folder(target, marker=PLAN_FILE, force=force) as folder:
        (folder / PLAN_FILE).write_text(plan.model_dump_json(indent=2) + "\n", encoding="utf-8")
        config = json.dumps(plan.deepspeed_config(), indent=2)
        (folder / "ds_config.json").write_text(config + "\n", encoding="utf-8")
        (folder / "README.md").write_text(folder_readme(plan), encoding="utf-8")
        for name, text in {"launch.sh": _LAUNCH, **launch_files(plan)}.items():
            (folder / name).write_text(text, encoding="utf-8")
            if name.endswith((".sh", ".sbatch")) and name != "environment.sh":
                (folder / name).chmod(0o755)
