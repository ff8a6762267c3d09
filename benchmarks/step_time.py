"""Compare predicted with measured step times on this machine's CPU, and list the predictions that are off.

python benchmarks/step_time.py --out reports     # calibrates for 1 and 2 ranks, then runs six plans: some minutes

The machine should be otherwise idle: two ranks use two cores.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import describe_run, write_report

from translution.distributed.calibration import calibrate
from translution.distributed.launcher import launch
from translution.distributed.runs import METRICS
from translution.planner.config import TrainingSpec, parse_model_spec
from translution.planner.hardware import ClusterSpec, local_cpu_cluster
from translution.planner.plans import make_plan, write_plan_folder

MODEL: dict[str, Any] = {"family": "vit", "image": 56, "patch": 8, "channels": 3, "classes": 100}
MODEL |= {"dim": 192, "depth": 4, "heads": 3}
STEPS, FIRST = 14, 5
"""Number of steps of a run, and the first step that counts: tracing slows down the third."""
PLANS: dict[str, dict[str, Any]] = {
    "ZeRO-3": {"stage": 3},
    "ZeRO-3, both on the host": {"stage": 3, "offload": "cpu"},
    "ZeRO-2, optimizer on the host": {"stage": 2, "offload": "cpu-optimizer"},
}
ALLOWED = 0.15
"""Relative error above which a prediction is listed as off."""


def report_progress(text: str) -> None:
    """Print one line of progress to stderr."""
    print(text, file=sys.stderr, flush=True)


def run(name: str, cluster: ClusterSpec, options: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Run one plan and return its predicted step time and the median of its measured ones."""
    training = TrainingSpec(data="synthetic", micro_batch=8, steps=STEPS)
    plan = make_plan(parse_model_spec(MODEL), cluster, training, **options)
    assert plan.time is not None
    write_plan_folder(plan, folder)
    run_folder = launch(folder, on_message=report_progress).run
    lines = [json.loads(line) for line in (run_folder / METRICS).read_text(encoding="utf-8").splitlines()]
    seconds = [line["seconds"] for line in lines if line["event"] == "step"][FIRST - 1 :]
    return {
        "what": f"{name}, {cluster.world_size} rank(s)",
        "predicted_s": plan.time.likely_s,
        "low_s": plan.time.low_s,
        "high_s": plan.time.high_s,
        "measured_s": statistics.median(seconds),
        "slowest_s": max(seconds),
        "fastest_s": min(seconds),
        "parts": {entry.name: entry.likely_s for entry in plan.time.breakdown},
    }


def render(document: dict[str, Any]) -> str:
    """Return the report as Markdown."""
    versions = ", ".join(f"{name} {version}" for name, version in document["machine"].items())
    parts = ["# Predicted and measured time of a step", ""]
    parts += [f"`{document['command']}` on {document['date']}: {versions}.", ""]
    parts += [
        "A vision transformer with 50 tokens, width 192, 4 layers, fp32, 8 samples per rank. Rates are measured by"
    ]
    parts += ["`translution calibrate` in the same run; step times are the median of ten steps.", ""]
    parts += ["| run | predicted | interval | measured | fastest to slowest | ratio |", "|---|--:|--:|--:|--:|--:|"]
    misses = []
    for row in document["rows"]:
        ratio = row["predicted_s"] / row["measured_s"]
        interval = f"{row['low_s']:.3f} to {row['high_s']:.3f} s"
        spread = f"{row['fastest_s']:.3f} to {row['slowest_s']:.3f} s"
        figures = f"{row['predicted_s']:.3f} s | {interval} | {row['measured_s']:.3f} s | {spread} | {ratio:.2f}"
        parts.append(f"| {row['what']} | {figures} |")
        if abs(ratio - 1) > ALLOWED:
            misses.append(f"- {row['what']}: {ratio:.2f}")
    parts += ["", f"Predictions off by more than {ALLOWED:.0%}:", "", *(misses or ["- none"]), ""]
    return "\n".join(parts)


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder for step_time.md and step_time.json")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2], help="numbers of ranks to measure")
    arguments = parser.parse_args()
    document = describe_run("step_time")
    document["machine"]["deepspeed"] = importlib.metadata.version("deepspeed")
    document["rates"], document["rows"] = {}, []
    for ranks in arguments.ranks:
        cluster = local_cpu_cluster(ranks)
        rates = calibrate(cluster, None, document["command"], report_progress)
        document["rates"][ranks] = rates.model_dump(mode="json")
        cluster = cluster.model_copy(update={"measured": rates})
        for name, options in PLANS.items():
            with tempfile.TemporaryDirectory(prefix="translution-time-") as folder:
                document["rows"].append(run(name, cluster, options, Path(folder) / "plan"))
            row = document["rows"][-1]
            report_progress(f"{row['what']}: {row['predicted_s']:.3f} s predicted, {row['measured_s']:.3f} s measured")
    write_report(arguments.out, "step_time", document, render(document))


if __name__ == "__main__":
    main()
