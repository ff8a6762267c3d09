"""Step time and bytes of relation parallelism, as ratios to ZeRO-3 within one run, on two ranks of this machine.

The same network trains under both, step by step in turns, from the same values with the same samples. Nothing is
printed unless the losses agree. ZeRO-3 is DeepSpeed's, with the tiles that a plan for this machine has.

usage: python benchmarks/relation_parallel.py [--out FOLDER] [--repeats N] [--small]
"""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from common import describe_run, seconds_once, write_report
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from translution.distributed import leave_process_group
from translution.distributed.system import free_port, launch_environment
from translution.distributed.training import Trainer
from translution.models import build
from translution.models.relation_parallel import average_table_gradients, clip_gradients, exclude_tables
from translution.planner import Plan, TrainingSpec, make_plan
from translution.planner.config import parse_model_spec
from translution.planner.costs import count_parameters, relation_parallel_traffic, zero3_table_traffic
from translution.planner.hardware import local_cpu_cluster

RANKS = 2
MODEL: dict[str, Any] = {"family": "vit", "image": 112, "patch": 16, "channels": 3, "classes": 100}
MODEL |= {"dim": 192, "depth": 6, "heads": 3}
SMALL = MODEL | {"image": 32, "dim": 16, "depth": 2, "heads": 2}
BATCH = 4
CHECKED = 3
"""Steps whose losses are compared, which are not timed."""
TOLERANCE = 1e-4
"""Largest relative difference of the losses, in fp32."""


class SentBytes:
    """Counts what this rank sends at torch's collectives, by the least that each needs to send."""

    def __init__(self) -> None:
        self.total = 0
        both = RANKS - 1
        shares: dict[str, Callable[..., float]] = {
            "all_gather_into_tensor": lambda _, own: both * own.nbytes,
            "all_gather_single": lambda _, own: both * own.nbytes,
            "all_gather": lambda _, own: both * own.nbytes,
            "reduce_scatter_tensor": lambda _, given: given.nbytes * both / RANKS,
            "reduce_scatter_single": lambda _, given: given.nbytes * both / RANKS,
            "reduce_scatter": lambda _, given: sum(x.nbytes for x in given) * both / RANKS,
            "all_reduce": lambda x: 2 * x.nbytes * both / RANKS,
        }
        # The second name is torch 2.13's for the first; DeepSpeed calls the first.
        for name, share in ((name, share) for name, share in shares.items() if hasattr(dist, name)):
            setattr(dist, name, functools.partial(self._run, getattr(dist, name), share, name))
        self.exchange = dist.all_to_all_single
        dist.all_to_all_single = self._exchange

    def _run(
        self, collective: Callable[..., Any], share: Callable[..., float], name: str, *given: Any, **rest: Any
    ) -> Any:
        tensors = [*given, *(x for key, x in rest.items() if key not in ("group", "op", "async_op"))]
        self.total += int(share(*tensors[: 1 if name == "all_reduce" else 2]))
        return collective(*given, **rest)

    def _exchange(self, out: Tensor, sent: Tensor, *sizes: Any, group: Any = None) -> Any:
        kept = sizes[1][dist.get_rank(group)] if len(sizes) == 2 else len(sent) // RANKS
        self.total += sent.nbytes - kept * (sent.nbytes // len(sent))
        return self.exchange(out, sent, *sizes, group=group)


def make_benchmark_plan(small: bool) -> Plan:
    training = TrainingSpec(data="synthetic", micro_batch=BATCH, steps=CHECKED)
    return make_plan(parse_model_spec(SMALL if small else MODEL), local_cpu_cluster(RANKS), training, stage=3)


class RelationParallel:
    """The plan's network with its relations shared out over the ranks, in a plain torch loop."""

    def __init__(self, plan: Plan) -> None:
        training = plan.training
        torch.manual_seed(training.seed)
        self.network = build(plan.model, tile_relations=plan.tile_relations, relation_group=dist.group.WORLD)
        self.model: nn.Module = DistributedDataParallel(exclude_tables(self.network))
        options: dict[str, Any] = {"betas": training.betas, "eps": training.epsilon, "fused": True}
        rate, decay = training.learning_rate, training.weight_decay
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=rate, weight_decay=decay, **options)
        self.clipping = training.gradient_clipping

    def step(self, images: Tensor, labels: Tensor) -> Tensor:
        loss = nn.functional.cross_entropy(self.model(images), labels)
        loss.backward()
        average_table_gradients(self.model)
        clip_gradients(self.model, self.clipping)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()

    def replicated_bytes(self) -> int:
        """Return what DistributedDataParallel's all-reduce, which is not called from Python, sends in a step."""
        ignored = self.model.parameters_to_ignore
        shared = sum(x.nbytes for name, x in self.network.named_parameters() if name not in ignored)
        return 2 * shared * (RANKS - 1) // RANKS


def zero3_step(trainer: Trainer, images: Tensor, labels: Tensor) -> Tensor:
    engine = trainer.engine
    loss = nn.functional.cross_entropy(engine.deepspeed_engine(images), labels)
    engine.backward(loss)
    engine.micro_step()
    return loss.detach()


def run_rank(small: bool, repeats: int, out: Path) -> None:
    """Train under both in turns; rank 0 writes the figures."""
    sent = SentBytes()
    torch.set_num_threads(1)
    plan = make_benchmark_plan(small)
    trainer = Trainer(plan, out.parent)
    # Without the trainer's own start and loop, which trace memory.
    trainer.engine.join_process_group()
    trainer.engine.build_model()
    trainer.engine.initialize_engine()
    ours = RelationParallel(plan)
    generator = torch.Generator().manual_seed(dist.get_rank())
    images = torch.randn(BATCH, 3, *plan.model.image, generator=generator)
    labels = torch.randint(plan.model.classes, (BATCH,), generator=generator)
    turns: dict[str, Callable[[], Tensor]] = {
        "relation": functools.partial(ours.step, images, labels),
        "zero3": functools.partial(zero3_step, trainer, images, labels),
    }
    losses: dict[str, list[float]] = {name: [turn().item() for _ in range(CHECKED)] for name, turn in turns.items()}
    found: dict[str, dict[str, list[float]]] = {name: {"seconds": [], "bytes": []} for name in turns}
    for _ in range(repeats):
        for name, turn in turns.items():
            dist.barrier()
            sent.total = 0
            found[name]["seconds"].append(seconds_once(functools.partial(_on_all_ranks, turn)))
            found[name]["bytes"].append(sent.total)
    found["relation"]["bytes"] = [count + ours.replicated_bytes() for count in found["relation"]["bytes"]]
    if dist.get_rank() == 0:
        out.write_text(json.dumps({"losses": losses, "turns": found, "tile_relations": plan.tile_relations}))
    leave_process_group()


def _on_all_ranks(turn: Callable[[], Tensor]) -> None:
    """Take a turn, and wait until all ranks have."""
    turn()
    dist.barrier()


def start_ranks(arguments: list[str], folder: Path) -> dict[str, Any]:
    """Run this script once per rank, and return what rank 0 wrote."""
    out, port = folder / "ranks.json", str(free_port())
    processes = []
    for rank in range(RANKS):
        world = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": RANKS, "MASTER_PORT": port, "MASTER_ADDR": "127.0.0.1"}
        environment = os.environ | launch_environment(local_cpu_cluster(RANKS)) | {k: str(v) for k, v in world.items()}
        command = [sys.executable, __file__, *arguments, "--rank-out", str(out)]
        processes.append(subprocess.Popen(command, env=environment, stdout=sys.stderr))
    codes = [process.wait() for process in processes]
    if any(codes):
        sys.exit(f"ranks ended with exit codes {codes}")
    result: dict[str, Any] = json.loads(out.read_text())
    return result


def make_document(small: bool, found: dict[str, Any]) -> dict[str, Any]:
    """Return the figures of both, and their ratios, after a check of the losses."""
    pairs = zip(found["losses"]["relation"], found["losses"]["zero3"], strict=True)
    difference = max(abs(ours - theirs) / abs(theirs) for ours, theirs in pairs)
    if not difference <= TOLERANCE:
        sys.exit(f"losses differ by {difference:.1e}, more than {TOLERANCE:.0e}: no figures are shown")
    spec = parse_model_spec(SMALL if small else MODEL)
    document = describe_run("relation_parallel")
    document["machine"]["deepspeed"] = importlib.metadata.version("deepspeed")
    turns = found["turns"]
    for name in turns:
        turns[name] = {kind: statistics.median(values) for kind, values in turns[name].items()}
    ratios = [turns["zero3"][kind] / turns["relation"][kind] for kind in ("seconds", "bytes")]
    return document | {
        "ranks": RANKS,
        "batch": BATCH,
        "model": spec.model_dump(mode="json"),
        "parameters": count_parameters(spec).model_dump(),
        "loss_difference": difference,
        "tile_relations": found["tile_relations"],
        **turns,
        "predicted_bytes": {
            "relation": relation_parallel_traffic(spec, ranks=RANKS, batch=BATCH, value_bytes=4).total,
            "zero3": zero3_table_traffic(spec, ranks=RANKS, value_bytes=4),
        },
        "times_faster": ratios[0],
        "times_fewer_bytes": ratios[1],
    }


def render(document: dict[str, Any]) -> str:
    machine, components = document["machine"], document["parameters"]["components"]
    lines = [
        "# Relation parallelism against ZeRO-3",
        "",
        f"`{document['command']}` on {document['date']}: {machine['processor']}, {machine['cores']} cores, torch "
        f"{machine['torch']}, DeepSpeed {machine['deepspeed']}, Python {machine['python']}, translution-scale "
        f"{machine['translution']}.",
        f"A vision transformer with {components['relation tables'] / 1e6:.1f} M parameters in tables, "
        f"{document['ranks']} ranks with {document['batch']} samples each, fp32, AdamW. Step times are medians of "
        f"turns; the losses of the first steps differ by {document['loss_difference']:.1e}. Bytes are those that a "
        "rank sends, for tables and all else; in parentheses what the planner's formula has for tables alone.",
        "",
        "| | step | sent per rank and step |",
        "|---|--:|--:|",
    ]
    for name, title in (("zero3", "ZeRO-3"), ("relation", "relation parallel")):
        predicted = document["predicted_bytes"][name] / 1e6
        sent = f"{document[name]['bytes'] / 1e6:.1f} MB ({predicted:.1f})"
        lines.append(f"| {title} | {document[name]['seconds']:.2f} s | {sent} |")
    faster, fewer = document["times_faster"], document["times_fewer_bytes"]
    return "\n".join([*lines, f"| ratio | {faster:.2f}× faster | {fewer:.1f}× fewer |"]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="folder for relation_parallel.json and relation_parallel.md")
    parser.add_argument("--repeats", type=int, default=7, help="number of timed steps of each")
    parser.add_argument("--small", action="store_true", help="a small network, to try the script")
    parser.add_argument("--rank-out", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank_out:
        run_rank(arguments.small, arguments.repeats, arguments.rank_out)
        return
    own = ["--repeats", str(arguments.repeats), *(["--small"] if arguments.small else [])]
    with tempfile.TemporaryDirectory(prefix="translution-relations-") as folder:
        found = start_ranks(own, Path(folder))
    document = make_document(arguments.small, found)
    write_report(arguments.out, "relation_parallel", document, render(document))


if __name__ == "__main__":
    main()
