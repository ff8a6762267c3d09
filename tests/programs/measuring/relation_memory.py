"""One of the ranks that share out relations, without DeepSpeed: python relation_memory.py OUT.

Every rank measures the peaks of forward and backward, and the bytes saved for backward, of every case. Rank r writes
OUT/r.json.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from translution.distributed import leave_process_group
from translution.distributed.profiling.allocation_tracer import SavedTensorCounter, count_every_allocation
from translution.distributed.profiling.single_process import measure_passes, random_samples
from translution.distributed.training.deepspeed_fixes import settled_collectives
from translution.models import build
from translution.planner.config import parse_model_spec

BATCH, TILE = 6, 9
SIZES: dict[str, Any] = {"dim": 64, "depth": 2, "heads": 4}
VIT: dict[str, Any] = {"family": "vit", "image": [32, 24], "patch": 8, "channels": 3, "classes": 10} | SIZES
GPT: dict[str, Any] = {"family": "gpt", "context": 24, "vocabulary": 211} | SIZES
MEAN = {"pool": "mean", "class_token": False}
# 65 tokens of width 16: values of pairs take more than rows.
MANY: dict[str, Any] = VIT | {"image": 64, "dim": 16, "ffn_dim": 16, "depth": 1}
FULL: dict[str, Any] = {"operator": "translution"}
LOW: dict[str, Any] = {"operator": "alpha", "c1": 4, "c2": 6}
CASES: list[tuple[dict[str, Any], str]] = [
    (VIT | FULL, "float32"),
    (VIT | FULL | MEAN | {"window": 2}, "bfloat16"),
    (VIT | FULL | {"roles": "kv"}, "float32"),
    (VIT | FULL | {"roles": "v"}, "bfloat16"),
    (VIT | FULL | {"roles": "q", "dropout": 0.2}, "float32"),
    (VIT | FULL | {"checkpointing": "block", "relative_layers": "first:1"}, "bfloat16"),
    (VIT | FULL, "autocast"),
    (VIT | LOW, "bfloat16"),
    (VIT | LOW | {"roles": "k"}, "float32"),
    (VIT | LOW | MEAN, "autocast"),
    (MANY | FULL, "float32"),
    (MANY | FULL, "bfloat16"),
    (MANY | FULL | MEAN | {"dropout": 0.2}, "bfloat16"),
    (MANY | FULL | {"roles": "qk"}, "float32"),
    (MANY | LOW, "autocast"),
    (GPT | FULL | {"dropout": 0.2}, "bfloat16"),
    (GPT | FULL | {"roles": "qk"}, "bfloat16"),
    (GPT | LOW | {"dropout": 0.1, "rotary": True}, "float32"),
    (GPT | LOW | {"checkpointing": "block", "roles": "v"}, "bfloat16"),
    # As on a GPU, in fp32: in bf16 a CPU widens sums, which a GPU does not.
    (VIT | FULL, "batched"),
    (GPT | FULL | {"roles": "kv"}, "batched"),
    (GPT | LOW, "batched"),
]


def measure(group: Any, case: dict[str, Any], how: str) -> dict[str, int]:
    """Return the peak of each phase, and what is saved for backward."""
    spec, autocast = parse_model_spec(case), torch.bfloat16 if how == "autocast" else None
    implementation = "batched" if how == "batched" else "grouped"
    dtype = torch.float32 if how in ("autocast", "batched") else getattr(torch, how)
    with torch.backends.mkldnn.flags(enabled=False):  # Its scratch depends on the processor.
        found = measure_passes(spec, BATCH, dtype, TILE, implementation, autocast, relation_group=group)
        network = build(spec, tile_relations=TILE, implementation=implementation, relation_group=group).to(dtype)
        inputs, targets = random_samples(spec, BATCH, dtype)
        counter = SavedTensorCounter(network)
        with counter.counting():
            with torch.autocast("cpu", autocast, enabled=autocast is not None):
                logits = network(inputs)
            torch.nn.functional.cross_entropy(logits.flatten(0, -2).float(), targets.flatten())
    return found | {"saved": counter.total_bytes}


def main() -> None:
    count_every_allocation()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    with settled_collectives():
        results = [measure(dist.group.WORLD, case, how) for case, how in CASES]
    (Path(sys.argv[1]) / f"{dist.get_rank()}.json").write_text(json.dumps(results))
    leave_process_group()


if __name__ == "__main__":
    main()
