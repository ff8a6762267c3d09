"""Train a full Translution ViT whose training state is larger than this machine's memory, and prove the prediction.

The model is vit-small/16, as deep as needed. Its training state (parameters, master copy, moments and gradients) lies
on NVMe. Two CPU ranks train it on two images, which it learns by heart, so that its loss must fall. After the seventh
step the ranks are killed. The run is resumed from the checkpoint of step 5, and the steps that it repeats must have
the same losses and gradient norms, bit for bit.

usage: python scripts/bigger_than_memory.py [--folder FOLDER] [--nvme-path FOLDER] [--out FOLDER] [--depth N]
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import math
import os
import platform
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from translution import planner
from translution.distributed.runs import METRICS, read_statuses
from translution.planner.common import (
    Phase,
    Tier,
    TranslutionError,
    format_bytes,
    processor,
    total_memory_bytes,
    usable_cores,
)
from translution.planner.config import parse_training
from translution.planner.costs import count_parameters
from translution.reports.inputs import PROCESS_PREFIX, compare_run

RATIO = 1.5
"""Smallest training state, as a multiple of the machine's memory."""
MODEL = "vit-small/16"
RANKS, STEPS, SAVED_STEP, KILLED_STEP = 2, 10, 5, 7
TILE_RELATIONS = 92
"""Relations per tile: a tile has 54 MiB and a layer 24 tiles, each a sub-group of its own."""


def measured_cluster(folder: Path, nvme_path: Path) -> str:
    """Measure this machine, drive included, and return the file with its rates."""
    path = folder / "cluster.yaml"
    path.unlink(missing_ok=True)
    options = ["--cluster", f"cpu:{RANKS}", "--nvme-path", str(nvme_path), "--out", str(path)]
    done = subprocess.run([sys.executable, "-m", "translution.cli", "calibrate", *options], check=False)
    if done.returncode:
        sys.exit("bigger_than_memory.py: this machine could not be measured")
    return str(path)


def write_images(folder: Path) -> None:
    """Write two training and two held-out images of noise, one of each class."""
    generator = np.random.default_rng(0)
    for split in ("train", "val"):
        for number in range(RANKS):
            path = folder / split / f"class_{number}" / "noise.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(generator.integers(0, 256, (224, 224, 3), np.uint8)).save(path)


def state_bytes(plan: planner.Plan) -> int:
    """Return the bytes of the training state of all ranks: their files on NVMe between two steps."""
    return plan.prediction.bytes_of(Phase.BETWEEN, Tier.NVME) * plan.world_size


def make_plan(model: str, cluster: planner.ClusterSpec, depth: int, nvme_path: Path, data: Path) -> planner.Plan:
    """Plan the model with everything on NVMe."""
    fields = {
        "data": "images",
        "data_path": str(data),
        "micro_batch": 1,
        "steps": STEPS,
        "warmup_steps": 2,
        # At 1e-4 the first steps of a model of this width overshoot.
        "learning_rate": 1e-5,
        "checkpoint_steps": SAVED_STEP,
        "keep_checkpoints": 1,
        # The drive may hold only one checkpoint and the swap files.
        "final_checkpoint": False,
        "evaluation_samples": "none",
    }
    return planner.make_plan(
        planner.load_model(model, depth=depth, classes=RANKS),
        cluster,
        parse_training(fields, "training"),
        tile_relations=TILE_RELATIONS if model == MODEL else None,
        offload="nvme",
        nvme_path=str(nvme_path),
    )


def choose_plan(
    model: str, cluster: planner.ClusterSpec, depth: int | None, nvme_path: Path, data: Path
) -> planner.Plan:
    """Plan the given depth, or the smallest whose training state is `RATIO` times this machine's memory."""
    if depth is not None:
        return make_plan(model, cluster, depth, nvme_path, data)
    first, second = (state_bytes(make_plan(model, cluster, layers, nvme_path, data)) for layers in (1, 2))
    missing = RATIO * total_memory_bytes() - second
    return make_plan(model, cluster, 2 + max(0, math.ceil(missing / (second - first))), nvme_path, data)


def launch(plan: Path, run: Path, *, resume: bool, kill_after: int | None) -> int:
    """Run ``translution launch`` and return its exit code.

    Args:
        plan: the plan folder.
        run: the run folder.
        resume: whether to resume the run.
        kill_after: kill all ranks once this step is in the metrics; None lets them finish.
    """
    command = [sys.executable, "-m", "translution.cli", "launch", str(plan), "--run", str(run)]
    process = subprocess.Popen([*command, *(["--resume"] if resume else [])])
    while process.poll() is None:
        time.sleep(0.2)
        if kill_after is not None and any(line["step"] == kill_after for line in steps_of(run)):
            for status in read_statuses(run):
                os.kill(status.pid, signal.SIGKILL)
            kill_after = None
    return process.returncode


def steps_of(run: Path) -> list[dict[str, Any]]:
    """Return the steps in the run's metrics, those that were repeated twice."""
    path = run / METRICS
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    metrics = [json.loads(line) for line in lines if line.endswith("\n")]
    return [line for line in metrics if line["event"] == "step"]


def find_differences(steps: list[dict[str, Any]]) -> list[str]:
    """Compare the steps that the resumed run repeated with those before the kill.

    Raises:
        SystemExit: if a step is missing.
    """
    numbers = [line["step"] for line in steps]
    expected = [*range(1, KILLED_STEP + 1), *range(SAVED_STEP + 1, STEPS + 1)]
    if numbers != expected:
        sys.exit(f"steps: {numbers} were done, not {expected}")
    first, second = steps[:KILLED_STEP], steps[KILLED_STEP:]
    return [
        f"step {one['step']}: {name} {one[name]!r} before the kill, {other[name]!r} after resuming"
        for one in first[SAVED_STEP:]
        for other in second
        for name in ("loss", "grad_norm")
        if one["step"] == other["step"] and one[name] != other[name]
    ]


def describe(plan: planner.Plan, run: Path) -> dict[str, Any]:
    """Return everything that the report shows."""
    steps = steps_of(run)
    table = compare_run(run)
    processes = table[table["what"].str.startswith(PROCESS_PREFIX)]
    rows = table[table.index.isin(processes.index) | (table["tier"] == Tier.NVME)]
    assert plan.time is not None
    return {
        "command": "make bigger-than-memory",
        "date": datetime.date.today().isoformat(),
        "machine": {
            "processor": processor(),
            "cores": usable_cores(),
            "memory_bytes": total_memory_bytes(),
            "python": platform.python_version(),
        }
        | {name: importlib.metadata.version(name) for name in ("torch", "deepspeed", "translution-scale")},
        "model": {"name": plan.model.name, "depth": plan.model.depth, "parameters": count_parameters(plan.model).total},
        "state_bytes": state_bytes(plan),
        "sub_groups": sub_groups(plan),
        "resident_bytes": int(processes.groupby("rank")["measured_bytes"].max().sum()),
        "predicted_step_s": [plan.time.low_s, plan.time.likely_s, plan.time.high_s],
        "steps": [{name: line[name] for name in ("step", "loss", "grad_norm", "seconds")} for line in steps],
        "differences": find_differences(steps),
        "memory": json.loads(rows.to_json(orient="records")),
    }


def sub_groups(plan: planner.Plan) -> int:
    """Return the number of sub-groups that the optimizer updates one after the other on a rank."""
    own = count_parameters(plan.model).total // plan.world_size
    return -(-own // plan.zero.sub_group_elements)


def markdown(document: dict[str, Any]) -> str:
    """Return the report as Markdown."""
    machine, model = document["machine"], document["model"]
    versions = ", ".join(f"{name} {machine[name]}" for name in ("torch", "deepspeed", "python", "translution-scale"))
    state, used = format_bytes(document["state_bytes"]), format_bytes(document["resident_bytes"])
    low, likely, high = document["predicted_step_s"]
    usual = statistics.median(line["seconds"] for line in document["steps"])
    repeated = "The repeated steps have the same losses and gradient norms, bit for bit."
    if document["differences"]:
        repeated = "The repeated steps differ: " + "; ".join(document["differences"]) + "."
    lines = [
        "# Bigger than the machine",
        "",
        f"`{document['command']}` on {document['date']}: {machine['cores']} cores of {machine['processor']}, "
        f"{format_bytes(machine['memory_bytes'])} of memory, {versions}.",
        "",
        f"{model['name']} with {model['depth']} layers, {model['parameters'] / 1e9:.2f} G parameters, ZeRO-3, {RANKS} "
        f"ranks, everything on NVMe, about {document['sub_groups']} sub-groups a rank. Its training state has {state}, "
        f"{document['state_bytes'] / machine['memory_bytes']:.2f} times the machine's memory. Both ranks' resident "
        f"sets together had at most {used}.",
        "",
        f"All ranks were killed after step {KILLED_STEP}; the run was resumed from the checkpoint of step "
        f"{SAVED_STEP}. {repeated}",
        f"A step took {usual:.0f} s (median); {likely:.0f} s were predicted ({low:.0f} to {high:.0f}).",
        "",
        "| step | loss | gradient norm | seconds |",
        "|--:|--:|--:|--:|",
        *(
            f"| {line['step']} | {line['loss']:.6f} | {line['grad_norm']:.4f} | {line['seconds']:.0f} |"
            for line in document["steps"]
        ),
        "",
        "Resident set of a rank's process in each phase, and its files on NVMe:",
        "",
        "| rank | what | predicted | measured | predicted / measured |",
        "|--:|---|--:|--:|--:|",
        *(
            f"| {row['rank']} | {row['what']} | {format_bytes(row['predicted_bytes'])} | "
            f"{format_bytes(row['measured_bytes'])} | {row['ratio']:.3f} |"
            for row in document["memory"]
        ),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Plan, train, kill, resume and report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("build/bigger"), help="folder for the plan and its run")
    parser.add_argument("--nvme-path", type=Path, help="folder on an NVMe drive; by default in --folder")
    parser.add_argument("--out", type=Path, default=Path("reports"), help="folder for the report")
    parser.add_argument("--model", default=MODEL, help="preset of the model")
    parser.add_argument("--depth", type=int, help="layers; by default as many as exceed the memory")
    parser.add_argument("--cluster", help=f"cpu:{RANKS}, or a cluster file; by default this machine is measured first")
    arguments = parser.parse_args()
    folder = arguments.folder.absolute()
    nvme_path = (arguments.nvme_path or folder / "swap").absolute()
    nvme_path.mkdir(parents=True, exist_ok=True)
    write_images(folder / "images")
    cluster = planner.load_cluster(arguments.cluster or measured_cluster(folder, nvme_path))
    plan = choose_plan(arguments.model, cluster, arguments.depth, nvme_path, folder / "images")
    plan.write(folder / "plan", force=True)
    print(
        f"{plan.model.name} with {plan.model.depth} layers: a training state of {format_bytes(state_bytes(plan))}, "
        f"{state_bytes(plan) / total_memory_bytes():.2f} times this machine's memory",
        flush=True,
    )
    number = 1
    while (run := folder / "plan" / "runs" / f"{number:03d}").exists():
        number += 1
    os.environ["TRANSLUTION_MEMORY"] = "process"
    if launch(folder / "plan", run, resume=False, kill_after=KILLED_STEP) == 0 or not steps_of(run):
        sys.exit("bigger_than_memory.py: the ranks could not be killed: no step was done, or all were")
    print("all ranks were killed; resuming", flush=True)
    if launch(folder / "plan", run, resume=True, kill_after=None):
        sys.exit(f"bigger_than_memory.py: the resumed run failed: see {run}")
    document = describe(plan, run)
    text = markdown(document)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "bigger_than_memory.json").write_text(json.dumps(document, indent=2) + "\n")
    (arguments.out / "bigger_than_memory.md").write_text(text)
    print(text)
    print(f"{folder} holds the run and its checkpoint; remove it when you have seen them")
    losses = [line["loss"] for line in document["steps"]]
    if document["differences"] or not losses[-1] < losses[0]:
        sys.exit("bigger_than_memory.py: the repeated steps differ, or the loss did not fall")


if __name__ == "__main__":
    try:
        main()
    except TranslutionError as error:
        print(f"bigger_than_memory.py: error: {error}", file=sys.stderr)
        sys.exit(2)
