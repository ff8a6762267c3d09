"""How long the planner takes: whole commands, and candidates of a search.

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

from translution.planner.config.presets import preset
from translution.planner.config.training import TrainingSpec
from translution.planner.hardware.cluster import load_cluster
from translution.planner.search.constraints import SearchConstraints
from translution.planner.search.searcher import Searcher

COMMANDS = {
    "estimate vit-base/16": 0.4,
    "estimate gpt-large/1024": 0.4,
    "plan vit-base/16 --cluster 8xA100-80 --precision bf16 --data synthetic --global-batch 512 --out OUT": 2.5,
    "plan vit-large/16 --cluster 8x8xH100 --precision bf16 --data synthetic --global-batch 1024 --out OUT": 2.5,
    "plan gpt-large/1024 --cluster 8x8xH100 --precision bf16 --data synthetic --global-batch 512 --out OUT": 2.5,
    "plan vit-base/16 --cluster 4xRTX4090 --precision bf16 --data synthetic --nvme-path /nvme --out OUT": 2.5,
    "plan vit-large/16 --cluster 1xRTX4090 --precision bf16 --data synthetic --out OUT": 2.5,
}
"""Commands, and the seconds that the whole process may take on two cores."""
SEARCHES = {"vit-base/16": "8xA100-80", "vit-large/16": "8x8xH100", "gpt-base/1024": "8xH100"}
TIMES = 5


def command_row(text: str, allowed: float) -> dict[str, Any]:
    """The least wall-clock seconds of several processes."""
    # Users keep Python's compiled files; a machine that does not would compile the package each time.
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
    """Candidates of a search and the least processor seconds it took."""
    spec, cluster = preset(name), load_cluster(cluster_name)
    training = TrainingSpec(precision="bf16", data="synthetic")
    seconds, considered = [], 0
    for number in range(TIMES):  # Another precision-free field each time: nothing may be remembered.
        fresh = training.model_copy(update={"seed": number})
        began = time.process_time()
        considered = Searcher(spec, cluster, fresh, SearchConstraints(global_batch=512)).considered
        seconds.append(time.process_time() - began)
    return {"what": f"{name} on {cluster_name}", "candidates": considered, "seconds": min(seconds)}


def render(document: dict[str, Any]) -> str:
    """The report as Markdown."""
    versions = ", ".join(f"{name} {version}" for name, version in document["machine"].items())
    lines = ["# Speed of the planner", "", f"`{document['command']}` on {document['date']}: {versions}.", ""]
    lines += ["| command, whole process | seconds | allowed |", "|---|--:|--:|"]
    lines += [f"| `{row['what']}` | {row['seconds']:.2f} | {row['allowed']} |" for row in document["commands"]]
    lines += ["", "| search | candidates | seconds | seconds for 5,000 |", "|---|--:|--:|--:|"]
    for row in document["searches"]:
        per = row["seconds"] / row["candidates"] * 5000
        lines.append(f"| {row['what']} | {row['candidates']:,} | {row['seconds']:.2f} | {per:.2f} |")
    misses = [row["what"] for row in document["commands"] if row["seconds"] > row["allowed"]]
    lines += ["", "Above what is allowed: " + (", ".join(f"`{what}`" for what in misses) or "nothing") + ".", ""]
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder for planner.md and planner.json")
    arguments = parser.parse_args()
    document = describe_run("planner")
    document["commands"] = [command_row(text, allowed) for text, allowed in COMMANDS.items()]
    document["searches"] = [search_row(name, cluster) for name, cluster in SEARCHES.items()]
    write_report(arguments.out, "planner", document, render(document))


if __name__ == "__main__":
    main()
