"""Plan folders, run folders and experiment results with made-up values, for tests of reports."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from translution.distributed.experiments.definitions import find_experiment
from translution.distributed.experiments.runner import ExperimentResult, Trial
from translution.distributed.runs.folder import METRICS, make_run_folders, memory_path
from translution.planner.common.provenance import make_provenance
from translution.planner.config.model import parse_model_spec
from translution.planner.config.training import TrainingSpec
from translution.planner.hardware.cluster import local_cpu_cluster
from translution.planner.plans.build import make_plan
from translution.planner.plans.folder import write_plan_folder
from translution.planner.plans.plan import Plan, load_plan

MALICIOUS = "<script>alert('x')</script>\"><img src=https://example.com/x>"


def plan_folder(folder: Path, name: str = "a model") -> Plan:
    """Write the folder of a tiny plan."""
    model = {"family": "vit", "image": 16, "patch": 4, "channels": 1, "classes": 10, "dim": 16, "depth": 2, "heads": 2}
    plan = make_plan(parse_model_spec(model | {"name": name}), local_cpu_cluster(1), TrainingSpec(steps=4))
    write_plan_folder(plan, folder)
    return plan


def run_folder(plan: Path, name: str, *, more: int = 0) -> Path:
    """Write a run whose measured memory is the plan's prediction plus `more` bytes."""
    run = plan / "runs" / name
    make_run_folders(run, plan)
    prediction = load_plan(plan).prediction
    measurement = {
        "rank": 0,
        "device": "cpu",
        "step": 2,
        "entries_bytes": {"parameters": prediction.of("parameters")},
        "resident_bytes": prediction.resident_bytes,
        "phase_peak_bytes": {peak.phase: peak.bytes + more for peak in prediction.peaks if peak.tier == "host"},
        "peak_bytes": prediction.peak_bytes + more,
        "process_peak_bytes": 2 * prediction.peak_bytes,
    }
    memory_path(run, 0).write_text(json.dumps(measurement))
    step = {"event": "step", "learning_rate": 1e-3, "samples_per_s": 100.0}
    lines = [
        {"event": "start", "steps": 4, "made": make_provenance("translution train <PLAN>", ("torch",)).model_dump()},
        *(step | {"step": number, "loss": 3.0 - number / 2} for number in range(1, 5)),
        {"event": "evaluation", "step": 4, "accuracy": 0.625, "loss": 1.1, "samples": 364},
    ]
    (run / METRICS).write_text("\n".join(map(json.dumps, lines)) + "\n")
    return run


def experiment_folder(folder: Path, name: str = "shift", *, quick: bool = False) -> ExperimentResult:
    """Write made-up results of an experiment with two models and three seeds."""
    asked = find_experiment(name)
    asked = asked.model_copy(update={"variants": asked.variants[-2:]})
    trials = [
        Trial(
            variant=variant.name,
            train=task.train,
            seed=seed,
            parameters=1000 * (place + 1),
            losses=dict.fromkeys(task.tests, 1.0 + seed / 10),
            accuracies=dict.fromkeys(task.tests, 0.5 + place / 4 + seed / 100),
            final_training_loss=0.5,
            seconds=1.0,
        )
        for place, variant in enumerate(asked.variants)
        for task in asked.tasks
        for seed in range(3)
    ]
    made = make_provenance(f"translution experiment {name} --out experiments/{name}", ("torch",))
    result = ExperimentResult(
        experiment=asked, quick=quick, steps=7, batch=64, trials=tuple(trials), seconds=12.0, made=made
    )
    folder.mkdir(parents=True)
    (folder / "result.json").write_text(result.model_dump_json(indent=2))
    return result


def built_once(factory: pytest.TempPathFactory, name: str, build: Callable[[Path], None]) -> Path:
    """Return a folder that the first worker of pytest-xdist builds, for which the others wait; tests only read it."""
    base = factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    folder, done = shared / name, shared / f"{name}-done"
    with (shared / f"{name}-lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            build(folder)
            done.touch()
    return folder
