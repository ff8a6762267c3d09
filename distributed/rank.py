"""One rank with its engine: how it joins the others, is built under ZeRO, runs forward, and says how it goes."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from translution.models import build
from translution.planner.errors import InputError
from translution.planner.plan import Plan
from translution.planner.simulation import INIT

from .data import Samples
from .recorder import Between, Recorder, Watch
from .run_files import METRICS, RankStatus, write_status
from .stopping import StopRequest

MODEL_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


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
        if self.ranks != self.plan.cluster.ranks:
            raise InputError(f"WORLD_SIZE: {self.ranks} is not allowed: must be {self.plan.cluster.ranks}, as planned")
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
        self.engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=self.config())

    def outputs(self, batch: Samples) -> Tensor:
        """The network's logits for a micro-batch."""
        inputs = batch.inputs.to(self.engine.device)
        if inputs.is_floating_point():
            inputs = inputs.to(MODEL_DTYPES[self.plan.training.precision])
        logits: Tensor = self.engine(inputs)
        return logits

    def loss(self, batch: Samples) -> Tensor:
        """Mean cross-entropy of a micro-batch."""
        logits = self.outputs(batch).flatten(0, -2).float()
        return torch.nn.functional.cross_entropy(logits, batch.targets.to(self.engine.device).flatten())
