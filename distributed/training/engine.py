"""One rank with its engine: how it joins the others, is built under ZeRO, runs forward,
evaluates, and says how it goes.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from translution.models import build
from translution.planner.common.errors import InputError
from translution.planner.plans.plan import Plan
from translution.planner.simulator.lifecycle import INIT

from ..data.base import Samples, DataSource
from ..profiling.recorder import Between, Recorder, Watch
from ..runs.folder import METRICS
from ..runs.status import RankStatus, write_status
from ..system.network import interface_towards
from ..system.signals import StopRequest
from .deepspeed_fixes import mend_gradient_reads

MODEL_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def smoothed_cross_entropy(logits: Tensor, targets: Tensor, smoothing: float) -> Tensor:
    """Mean cross-entropy of logits (S, classes).

    Args:
        logits: in fp32.
        targets: classes, S of them in any shape; or shares of the classes (S, classes), by which mixed images have
            the cross-entropies of their classes added up.
        smoothing: share of each target that is spread evenly over all classes.
    """
    targets = targets if targets.is_floating_point() else targets.flatten()
    return torch.nn.functional.cross_entropy(logits, targets, label_smoothing=smoothing)


class EngineRank:
    """One rank of a run, as far as any use of the model goes.

    Args:
        plan: what to train and how.
        run: the run folder, shared by all ranks.
        watch: what its recorder measures.
    """

    def __init__(self, plan: Plan, run: Path, watch: Watch = "allocations") -> None:
        self.plan, self.run, self.watch = plan, run, watch
        self.rank, self.ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        self.step = 0
        self.samples: list[Tensor] = []
        self.model: torch.nn.Module | None = None
        """Between its construction and the engine's."""
        self.engine: Any = None
        self.recorder: Recorder | None = None
        self.between: Between | None = None
        self.stop = StopRequest()
        self._sums = torch.zeros(4, dtype=torch.float64)

    def say(self, state: str, message: str = "") -> None:
        """Write this rank's status."""
        status = {"rank": self.rank, "state": state, "step": self.step, "message": message, "pid": os.getpid()}
        write_status(self.run, RankStatus.model_validate(status))

    @property
    def logs(self) -> bool:
        """Whether this rank writes the metrics: only rank 0 does, and no second process that measures the run."""
        return self.rank == 0 and self.watch == "allocations"

    def log(self, **values: object) -> None:
        """Append a line to the metrics file, if it is this rank that does."""
        if self.logs:
            with (self.run / METRICS).open("a", encoding="utf-8") as file:
                file.write(json.dumps(values) + "\n")

    def start(self) -> None:
        """Join the process group and build the engine.

        Raises:
            InputError: if the world is not the plan's.
        """
        self.say("started")
        if self.ranks != self.plan.cluster.world_size:
            raise InputError(
                f"WORLD_SIZE: {self.ranks} is not allowed: must be {self.plan.cluster.world_size}, as planned"
            )
        self.join()
        self.recorder = Recorder(self.plan, self.rank, self.watch)
        self.recorder.record(INIT, self.construct)
        self.recorder.record(INIT, self.engage)

    def join(self) -> None:
        """Join the process group."""
        cuda = self.plan.cluster.device == "cuda"
        import deepspeed

        if cuda:
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        elif "GLOO_SOCKET_IFNAME" not in os.environ and (name := interface_towards(os.environ.get("MASTER_ADDR", ""))):
            os.environ["GLOO_SOCKET_IFNAME"] = name
        deepspeed.init_distributed(dist_backend="nccl" if cuda else "gloo")

    def config(self) -> dict[str, Any]:
        """What DeepSpeed is told."""
        return self.plan.deepspeed_config()

    def network(self) -> torch.nn.Module:
        """The network, not yet under the engine."""
        return build(self.plan.model, tile_relations=self.plan.tile_relations)

    def construct(self) -> None:
        """Make the model, partitioned as it is made under ZeRO-3."""
        import deepspeed

        torch.manual_seed(self.plan.training.seed)
        with deepspeed.zero.Init(config_dict_or_path=self.config(), enabled=self.plan.zero.stage == 3):
            self.model = self.network()

    def engage(self) -> None:
        """Put the model under DeepSpeed's engine."""
        import deepspeed

        # Every rank has samples of its own, so it drops other values.
        torch.manual_seed(self.plan.training.seed + 1 + self.rank)
        model, self.model = self.model, None
        assert model is not None
        if self.plan.zero.offload_optimizer.device == "nvme":
            mend_gradient_reads()
        self.engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=self.config())

    def outputs(self, batch: Samples) -> Tensor:
        """The network's logits for a micro-batch."""
        inputs = batch.inputs.to(self.engine.device)
        if inputs.is_floating_point():
            inputs = inputs.to(MODEL_DTYPES[self.plan.training.precision])
        logits: Tensor = self.engine(inputs)
        return logits

    def loss(self, batch: Samples) -> Tensor:
        """Mean cross-entropy of a micro-batch; targets that are shares of the classes weigh one each."""
        logits = self.outputs(batch).flatten(0, -2).float()
        targets = batch.targets.to(self.engine.device)
        return smoothed_cross_entropy(logits, targets, self.plan.training.label_smoothing)

    def seed_step(self) -> None:
        """Set torch's random state: what is dropped depends on the step and the rank, and on nothing before.

        A resumed run drops the same.
        """
        torch.manual_seed((self.plan.training.seed * self.ranks + self.rank + 1) * 1_000_003 + self.step)

    def mean_over_ranks(self, *values: float) -> list[float]:
        """Each value's mean over all ranks."""
        # gloo's thread lets go of a tensor some time later, perhaps in a phase that is measured: it gets this one.
        sums = self._sums.to(self.engine.device)[: len(values)]
        sums.copy_(torch.tensor(values, dtype=torch.float64))
        torch.distributed.all_reduce(sums)
        return [value / self.ranks for value in sums.tolist()]

    @torch.no_grad()
    def evaluate(self, held_out: DataSource) -> tuple[float, float, int]:
        """Mean loss and accuracy over the held-out samples, and how many those were; each is counted once.

        Every rank runs the same number of batches, as ZeRO-3's gathers require; a rank that has no
        sample left for one computes on a repeated sample and does not count it.
        """
        self.engine.eval()
        micro, totals = self.plan.training.micro_batch, torch.zeros(3, dtype=torch.float64, device=self.engine.device)
        count = min(self.plan.training.evaluation_samples or len(held_out), len(held_out))
        for start in range(0, count, micro * self.ranks):
            index = torch.arange(start + self.rank * micro, start + (self.rank + 1) * micro)
            valid = index < count
            # Spread over all of them: they may lie in the order of their classes.
            batch = held_out.select(index.clamp(max=count - 1) * len(held_out) // count)
            logits = self.outputs(batch).float()[valid]
            targets = batch.targets.to(self.engine.device)[valid]
            losses = torch.nn.functional.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction="sum")
            right = (logits.argmax(-1) == targets).sum()
            totals += torch.stack([losses.double(), right.double(), torch.full_like(right, targets.numel()).double()])
        self.engine.train()
        torch.distributed.all_reduce(totals)
        return float(totals[0] / totals[2]), float(totals[1] / totals[2]), count
