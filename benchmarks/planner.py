"""Time of the planner's commands, as complete processes, and of its searches.

python benchmarks/planner.py --out benchmarks/results
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import describe_run, write_report

from translution.planner.config import TrainingSpec, preset
from translution.planner.hardware import load_cluster
from translution.planner.search import SearchConstraints, Searcher

COMMANDS = {
    "estimate vit-base/16": 0.4,
    "estimate gpt-large/1024": 0.4,
    "plan vit-base/16 --cluster 8xA100-80 --precision bf16 --data synthetic --global-batch 512 --out OUT": 2.5,
    "plan vit-large/16 --cluster 8x8xH100 --precision bf16 --data synthetic --global-batch 1024 --out OUT": 2.5,
    "plan gpt-large/1024 --cluster 8x8xH100 --precision bf16 --data synthetic --global-batch 512 --out OUT": 2.5,
    "plan vit-base/16 --cluster 4xRTX4090 --precision bf16 --data synthetic --nvme-path /nvme --out OUT": 2.5,
    "plan vit-large/16 --cluster 1xRTX4090 --precision bf16 --data synthetic --out OUT": 2.5,
}
"""Commands, and the allowed seconds of the complete process on two cores."""
SEARCHES = {"vit-base/16": "8xA100-80", "vit-large/16": "8x8xH100", "gpt-base/1024": "8xH100"}
"""Cluster of each model's search."""
TIMES = 5
"""Number of runs, of which the fastest counts."""


def command_row(text: str, allowed: float) -> dict[str, Any]:
    """Return the minimum wall-clock seconds of a command over several processes."""
    # Let Python write compiled files, as users do; otherwise each process would compile the package again.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    seconds = []
    for _ in range(TIMES):
        with tempfile.TemporaryDirectory() as folder:
            words = [word.replace("OUT", f"{folder}/plan") for word in text.split()]
            began = time.perf_counter()
            command = [sys.executable, "-m", "translution.cli", *words]
            subprocess.run(command, env=environment, capture_output=True, check=False)
            seconds.append(time.perf_counter() - began)
    return {"what": f"translution {text}", "seconds": min(seconds), "allowed": allowed}


def search_row(name: str, cluster_name: str) -> dict[str, Any]:
    """Return the number of candidates of a search and its minimum CPU seconds."""
    spec, cluster = preset(name), load_cluster(cluster_name)
    training = TrainingSpec(precision="bf16", data="synthetic")
    seconds, considered = [], 0
    for number in range(TIMES):  # A different seed each time, so that no cached result is reused.
        fresh = training.model_copy(update={"seed": number})
        began = time.process_time()
        considered = Searcher(spec, cluster, fresh, SearchConstraints(global_batch=512)).considered
        seconds.append(time.process_time() - began)
    return {"what": f"{name} on {cluster_name}", "candidates": considered, "seconds": min(seconds)}


def render(document: dict[str, Any]) -> str:
    """Return the report as Markdown."""
    versions = ", ".join(f"{name} {version}" for name, version in document["machine"].items())
    lines = ["# Speed of the planner", "", f"`{document['command']}` on {document['date']}: {versions}.", ""]
    lines += ["| command, complete process | seconds | allowed |", "|---|--:|--:|"]
    lines += [f"| `{row['what']}` | {row['seconds']:.2f} | {row['allowed']} |" for row in document["commands"]]
    lines += ["", "| search | candidates | seconds | seconds for 5,000 |", "|---|--:|--:|--:|"]
    for row in document["searches"]:
        per = row["seconds"] / row["candidates"] * 5000
        lines.append(f"| {row['what']} | {row['candidates']:,} | {row['seconds']:.2f} | {per:.2f} |")
    misses = [row["what"] for row in document["commands"] if row["seconds"] > row["allowed"]]
    lines += ["", "Above the allowed time: " + (", ".join(f"`{what}`" for what in misses) or "none") + ".", ""]
    return "\n".join(lines)


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder for planner.md and planner.json")
    arguments = parser.parse_args()
    document = describe_run("planner")
    document["commands"] = [command_row(text, allowed) for text, allowed in COMMANDS.items()]
    document["searches"] = [search_row(name, cluster) for name, cluster in SEARCHES.items()]
    write_report(arguments.out, "planner", document, render(document))


if __name__ == "__main__":
    main()
