"""Predicted memory against the measurements of two real ranks, for every stage and offload.

Torch's allocations are compared for small models. The resident sets of processes are compared for a model with many
sub-groups and tiles, whose optimizer states are most of what a rank holds: one copy of them too many would show.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from helpers.runs import TINY, run_plan, write_plan

from translution.distributed.runs.mode import RunMode
from translution.planner.common.machine import usable_cores
from translution.planner.common.phases import Phase
from translution.reports.inputs.run_accuracy import PROCESS_PREFIX, RESIDENT, SAVED, compare_run

pytestmark = pytest.mark.skipif(usable_cores() < 2, reason="needs two cores")

WIDE = TINY | {"dim": 192, "heads": 3}
GPT = {"family": "gpt", "context": 24, "vocabulary": 300, "dim": 192, "depth": 2, "heads": 3}
HYBRID = {"relative_layers": "first:1", "head_dim": 64}
FEW = {"persistence_threshold_elements": 10_000}
"""gloo may hold the buffer of the persistent parameters between steps: it is to be small."""
LLAMA = {"norm": "rms", "ffn": "swiglu", "bias": False, "kv_heads": 1, "tied_embeddings": True}
ODD = {"pool": "mean", "class_token": False}
LOW = {"operator": "alpha", "c1": 16, "c2": 24}
# A rank's partition of a tile is offloaded to NVMe only from 1 MiB on.
SWAPPED = {"model": TINY | {"dim": 256, "depth": 2, "heads": 4}, "tile": 16}
BF16 = {"precision": "bf16"}
WIDE_GRADIENTS = {"precision": "bf16", "grad_accum_dtype": "fp32"}
CASES: dict[str, dict[str, Any]] = {
    "0-bf16": {"stage": 0, **BF16, "model": WIDE | LOW},
    "0-8bit": {"stage": 0, "adam": "8bit", "model": WIDE | LOW},
    "1-fp32": {"stage": 1, "model": GPT | LLAMA | {"operator": "attention", "rotary": True}, "loss": "chunked"},
    "2-mixed": {"stage": 2, "mixup": 0.8, "label_smoothing": 0.1, "model": WIDE | {"classes": 4000}},
    "3-fp32": {"stage": 3, "model": WIDE | {"checkpointing": "block"}},
    "3-bf16-gpt": {
        "stage": 3,
        **BF16,
        "model": GPT | HYBRID | LLAMA,
        "loss": "chunked",
        "zero_overrides": FEW,
        "tile": 4,
    },
    # torch's checkpoint keeps the weights that a recomputed block gathers.
    "3-attention": {"stage": 3, "model": WIDE | {"checkpointing": "block", "operator": "attention"}},
    "3-absolute": {"stage": 3, "model": WIDE | {"checkpointing": "block", "operator": "absolute"}},
    "3-autocast": {"stage": 3, "torch_autocast": "bf16", "model": GPT | HYBRID, "loss": "chunked", "tile": 4},
    "3-bf16-hpz": {"stage": 3, **BF16, "nodes": 2, "zero_overrides": {"hpz_ranks": 2}},
    "3-bf16-states": {"stage": 3, "bf16_master": True, "bf16_states": True, **BF16},
    "3-8bit": {"stage": 3, **BF16, "adam": "8bit"},
    # Gradients accumulate in fp32: in buffers of all parameters, of a rank's share, and with the optimizer on the host.
    "1-wide": {"stage": 1, "accumulation": 2, **WIDE_GRADIENTS, "model": WIDE | LOW},
    "2-cpu-optimizer": {"stage": 2, "offload": "cpu-optimizer", "accumulation": 2, **WIDE_GRADIENTS},
    "1-cpu-optimizer": {"stage": 1, "offload": "cpu-optimizer", **WIDE_GRADIENTS, "model": WIDE | LOW},
    # Recomputed blocks, and many samples: the peak is in a block, while the first buckets are reduced.
    "2-block": {"stage": 2, "micro_batch": 32, "model": WIDE | LOW | {"checkpointing": "block"}},
    "3-cpu-optimizer": {"offload": "cpu-optimizer", "accumulation": 2, "grad_accum_dtype": "fp32", **BF16},
    "3-cpu": {"offload": "cpu", **BF16},
    "3-nvme-optimizer": {"offload": "nvme-optimizer", **BF16, **SWAPPED},
    "3-nvme": {"offload": "nvme", **BF16, **SWAPPED},
    # Two owners of 25 and 24 relations, without and with a replica of each.
    "1-relation": {"stage": 1, "relation_parallel": 2, "offload": "cpu-optimizer", **BF16, "model": WIDE | LOW | ODD},
    "2-relation": {"stage": 2, "relation_parallel": 2, "accumulation": 2, **WIDE_GRADIENTS, "model": WIDE | ODD},
    "3-relation": {
        "stage": 3,
        "relation_parallel": 2,
        "nodes": 2,
        "model": WIDE | ODD | {"dropout": 0.1, "checkpointing": "block"},
    },
}
RESUMED = ("0-8bit", "3-bf16-gpt", "1-relation")
"""Cases of which a checkpoint is loaded as well, by other processes."""
WITHIN_BYTES = 2**16
"""Tolerance for scalars, step counters and padding that the memory breakdown does not list."""


def measured(folder: Path, *modes: RunMode, nodes: int = 1, **options: Any) -> pd.DataFrame:
    """Compare prediction and measurement of a plan's two ranks of each node after it has run in each mode."""
    nvme = folder / "nvme" if "nvme" in options.get("offload", "none") else None
    if nvme is not None:
        nvme.mkdir()
    # The third step is measured; nothing is after it but the evaluation and the checkpoint.
    values = {"model": WIDE, "tile": 13, "micro_batch": 8, "data": "synthetic", "steps": 3} | options
    if values["model"].get("operator") == "attention":
        values["tile"] = None  # Attention has no tables.
    plan = write_plan(folder / "plan", 2, nvme_path=nvme, nodes=nodes, **values)
    for mode in modes:
        run = run_plan(plan, 2 * nodes, mode)
    return compare_run(run)


def is_late(row: dict[str, Any]) -> bool:
    """True if a peak is above the prediction by a tensor or less, as when gloo's thread frees one late."""
    return row["what"].startswith("peak of") and 0.95 <= row["ratio"] < 1.0


@pytest.mark.parametrize("name", CASES)
def test_states_are_exact_and_peaks_within_five_percent_and_never_low(name: str, tmp_path: Path) -> None:
    modes = (RunMode.MEASURE, RunMode.MEASURE_RESUME) if name in RESUMED else (RunMode.MEASURE,)
    for attempt in range(3):
        folder = tmp_path / str(attempt)
        folder.mkdir()
        table = measured(folder, *modes, **CASES[name])
        # gloo is rarely late; a wrong prediction fails in every attempt.
        if not any(is_late(row) for row in table.to_dict("records")):
            break
    assert set(table["rank"]) == set(range(2 * CASES[name].get("nodes", 1)))
    if "nvme" in name:
        files = set(table[table["tier"] == "nvme"]["what"])
        assert files == {"master parameters", "optimizer states", "gradients"} | (
            {"parameters"} if name == "3-nvme" else set()
        )
        assert "optimizer swap buffers" in set(table[table["tier"] == "pinned"]["what"])
    peaks = table["what"].str.startswith("peak of")
    assert sorted(table[peaks]["what"].unique()) == [
        "peak of backward", "peak of checkpoint save", "peak of evaluation", "peak of first optimizer step",
        "peak of forward", "peak of init", "peak of optimizer step", *(["peak of resume"] if name in RESUMED else []),
    ]  # fmt: skip
    for row in table.to_dict("records"):
        difference = row["predicted_bytes"] - row["measured_bytes"]
        where = f"{row['what']} of rank {row['rank']}: {row['predicted_bytes']} for {row['measured_bytes']}"
        if row["what"] == SAVED:
            assert difference == 0, where
        elif row["what"] == RESIDENT or row["what"].startswith("peak of"):
            assert 1.0 <= row["ratio"] <= 1.05 or 0 <= difference <= WITHIN_BYTES, where
        elif row["what"] != "other":
            assert abs(difference) <= (WITHIN_BYTES if row["tier"] == "host" else 0), where


MANY_TILES = TINY | {"image": 80, "patch": 16, "channels": 3, "dim": 256, "heads": 4}
SMALL_TILE = 8
"""Relations per tile: a rank's partition of a tile has 1 MiB, and it has 60 of them."""
SLACK_BYTES = 100_000_000
"""What a process may hold less than is predicted. A copy of a rank's optimizer states would show: they have 8 bytes for
each of 17 million elements."""
PHASES = (
    Phase.INIT, Phase.FIRST_STEP, Phase.FORWARD, Phase.BACKWARD, Phase.STEP, Phase.SAVE, Phase.EVALUATION,
)  # fmt: skip
OFFLOADS: dict[str, dict[str, Any]] = {
    "none": {},
    "cpu-optimizer": {"offload": "cpu-optimizer"},
    "cpu": {"offload": "cpu", "precision": "bf16"},
    # The optimizer alone on NVMe without a pipeline is swapped as in "nvme".
    "nvme-optimizer, pipelined": {
        "offload": "nvme-optimizer",
        "zero_overrides": {
            "offload_optimizer.pipeline_read": True,
            "offload_optimizer.pipeline_write": True,
            "offload_optimizer.buffer_count": 12,
        },
    },
    "nvme": {"offload": "nvme", "precision": "bf16"},
}


@pytest.mark.parametrize("name", OFFLOADS)
def test_a_process_holds_what_is_predicted(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # conftest.py has the C library keep what is freed.
    monkeypatch.delenv("GLIBC_TUNABLES")
    nvme = tmp_path / "nvme" if "nvme" in name else None
    if nvme:
        nvme.mkdir()
    values = {"micro_batch": 2, "data": "synthetic", "steps": 2, "evaluation_samples": 4} | OFFLOADS[name]
    folder = write_plan(tmp_path / "plan", 2, model=MANY_TILES, tile=SMALL_TILE, nvme_path=nvme, **values)
    run, phases = run_plan(folder, 2, RunMode.MEASURE_PROCESS), PHASES
    if name in ("cpu", "nvme"):
        # Only a run that trains makes checkpoints that can be resumed.
        (run / "checkpoint" / "process_2").rename(run / "checkpoint" / "step_2")
        run_plan(folder, 2, RunMode.MEASURE_RESUME_PROCESS)
        phases = (*PHASES, Phase.RESUME)
    table = compare_run(run)
    process = table[table["what"].str.startswith(PROCESS_PREFIX)]
    assert set(process["what"]) == {f"{PROCESS_PREFIX} in {phase}" for phase in phases}
    assert len(process) == 2 * len(phases)
    too_much = process["predicted_bytes"] - process["measured_bytes"]
    assert too_much.between(0, SLACK_BYTES).all(), process[["what", "predicted_bytes", "measured_bytes"]].to_string()
