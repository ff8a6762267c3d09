"""The training script of a plan for FSDP2, which the plan folder holds as ``train_fsdp2.py``."""

from __future__ import annotations

FSDP2_SCRIPT_FILE = "train_fsdp2.py"
FSDP2_SCRIPT = '''"""Train this folder's plan with torch's FSDP2: launch-torchrun.sh starts it. Change it freely."""

import json
import sys
import time
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from translution.distributed.fsdp2 import (
    batch_loss,
    build_sharded,
    join_ranks,
    learning_rate,
    make_optimizer,
    newest_step,
    training_steps,
)
from translution.planner.plans import load_plan

plan, run = load_plan(Path(__file__).parent), Path(sys.argv[1])
mesh = join_ranks(plan)
network = build_sharded(plan, mesh)  # torch.distributed.fsdp.fully_shard on every tile, every block and the rest
optimizer = make_optimizer(plan, network)
run.mkdir(parents=True, exist_ok=True)


def state() -> dict:
    parameters, moments = get_state_dict(network, optimizer)
    return {"network": parameters, "optimizer": moments}


first = newest_step(run)  # 0 unless the run has a checkpoint
if first:
    saved = state()
    dcp.load(saved, checkpoint_id=run / f"step_{first}")
    set_state_dict(network, optimizer, model_state_dict=saved["network"], optim_state_dict=saved["optimizer"])

for step, batches in training_steps(plan, mesh, first):
    began, loss = time.perf_counter(), torch.zeros((), device=mesh.device_type)
    for batch in batches:
        part = batch_loss(plan, network, batch) / len(batches)
        part.backward()
        loss += part.detach()
    if plan.training.gradient_clipping:
        torch.nn.utils.clip_grad_norm_(network.parameters(), plan.training.gradient_clipping)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(plan, step)
    optimizer.step()
    optimizer.zero_grad()
    torch.distributed.all_reduce(loss)
    done = step + 1
    if mesh.get_rank() == 0:
        row = {"step": done, "loss": loss.item() / mesh.size(), "seconds": time.perf_counter() - began}
        print(json.dumps(row), flush=True)
        with (run / "metrics.jsonl").open("a") as file:
            print(json.dumps(row), file=file)
    if done == plan.training.steps or (plan.training.checkpoint_steps and done % plan.training.checkpoint_steps == 0):
        dcp.save(state(), checkpoint_id=run / f"step_{done}")

torch.distributed.destroy_process_group()
'''
