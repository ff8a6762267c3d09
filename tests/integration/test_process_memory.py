"""The resident set of ranks that have many sub-groups and tiles, in every phase and with every offload.

The optimizer states are most of what a rank holds, so that one copy of them too many would show.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers.runs import run_plan, write_plan

from translution.distributed.runs.mode import RunMode
from translution.planner.common.machine import usable_cores
from translution.planner.common.phases import Phase
from translution.reports.inputs.run_accuracy import PROCESS_PREFIX, compare_run

pytestmark = pytest.mark.skipif(usable_cores() < 2, reason="needs two cores; the project's CI has them")

MODEL = {"family": "vit", "image": 112, "patch": 16, "channels": 3, "classes": 10, "dim": 256, "depth": 2, "heads": 4}
TILE = 8
"""Relations per tile: a rank's partition of a tile has 1 MiB, and it has 126 of them."""
PHASES = (
    Phase.INIT, Phase.FIRST_STEP, Phase.FORWARD, Phase.BACKWARD, Phase.STEP, Phase.SAVE, Phase.EVALUATION, Phase.RESUME,
)  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    "none": {},
    "cpu-optimizer": {"offload": "cpu-optimizer"},
    "cpu": {"offload": "cpu", "precision": "bf16"},
    "nvme-optimizer": {"offload": "nvme-optimizer"},
    "nvme": {"offload": "nvme", "precision": "bf16"},
}


@pytest.mark.parametrize("name", CASES)
def test_a_process_holds_what_is_predicted(name: str, tmp_path: Path) -> None:
    nvme = tmp_path / "nvme" if "nvme" in name else None
    if nvme:
        nvme.mkdir()
    values = {"micro_batch": 2, "data": "synthetic", "steps": 3, "evaluation_samples": 16} | CASES[name]
    folder = write_plan(tmp_path / "plan", 2, model=MODEL, tile=TILE, nvme_path=nvme, **values)
    run_plan(folder, 2, RunMode.MEASURE_PROCESS)
    # Only a run that trains makes checkpoints that can be resumed.
    (folder / "runs/by-hand/checkpoint/process_3").rename(folder / "runs/by-hand/checkpoint/step_3")
    table = compare_run(run_plan(folder, 2, RunMode.MEASURE_RESUME_PROCESS))
    process = table[table["what"].str.startswith(PROCESS_PREFIX)]
    assert set(process["what"]) == {f"{PROCESS_PREFIX} in {phase}" for phase in PHASES}
    assert len(process) == 2 * len(PHASES)
    assert process["ratio"].between(1.0, 1.1).all(), process[["what", "ratio"]].to_string()
    # What is wrong by the optimizer states of a rank would be found.
    assert (0.1 * process["measured_bytes"]).max() < 8 * 33e6
