"""The model under DeepSpeed's engine on one rank: process group, construction, loss, gradients and evaluation."""

from __future__ import annotations

import datetime
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from translution.models import build
from translution.models.relation_parallel import share_dropout
from translution.planner.common import InputError, Phase
from translution.planner.config import ModelSpec, PatchSpec
from translution.planner.plans import Plan

from ..data.base import Samples
from ..runs.mode import checks_swap
from ..runs.progress import Progress
from ..system.compiled_ops import has_gpu_compiler
from ..system.network import interface_towards
from ..system.nvme_swap import SwapFolder
from ..system.op_process import simplify_gpu_architectures
from .deepspeed_fixes import (
    answer_for_processor,
    ask_numa_once,
    check_swap_files,
    import_muon_uncompiled,
    leave_compiler_out,
    patch_nvme_optimizers,
    probe_one_op,
)
from .relation_groups import RelationMesh, average_over_group, compare_replicas, complete_norms
from .swap_checksums import SwapChecksums

COLLECTIVE_LIMIT = datetime.timedelta(days=7)
"""Time limit of a collective: a rank may wait for a slow drive of another one. `rank_watch` ends runs that hang."""
_OPTIMIZER_FOLDER = "optimizer"
"""Folder of the optimizer's swap files. Source: DeepSpeed 0.19.8, runtime/swap_tensor/optimizer_utils.py."""
MODEL_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def smoothed_cross_entropy(logits: Tensor, targets: Tensor, smoothing: float) -> Tensor:
    """Mean cross-entropy of logits (S, classes).

    Args:
        logits: in fp32.
        targets: S class indices in any shape; or class probabilities (S, classes), as mixed images have.
        smoothing: share of each target that is spread evenly over all classes.
    """
    targets = targets if targets.is_floating_point() else targets.flatten()
    return torch.nn.functional.cross_entropy(logits, targets, label_smoothing=smoothing)


def wait_without_limit() -> None:
    """Let the collectives of every process group, DeepSpeed's own ones included, wait for `COLLECTIVE_LIMIT`.

    Source: torch 2.13, distributed/distributed_c10d.py: a new group has its backend's default of 10 or 30 minutes.
    """
    from torch.distributed import distributed_c10d

    # torch 2.15 has made it public.
    set_timeout = getattr(distributed_c10d, "set_timeout", None) or distributed_c10d._set_pg_timeout
    for group in list(distributed_c10d._world.pg_map):
        set_timeout(COLLECTIVE_LIMIT, group)


def has_top5(model: ModelSpec) -> bool:
    """Return True if the evaluation of a model tells the accuracy of its five most likely classes."""
    return isinstance(model, PatchSpec) and model.classes > 5


class Engine:
    """One rank's model under DeepSpeed's engine.

    Args:
        plan: the model, the cluster and the training.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.rank, self.world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        self.model: torch.nn.Module | None = None
        """The network between `build_model` and `initialize_engine`."""
        self.deepspeed_engine: Any = None
        """DeepSpeed's engine, once `initialize_engine` has run."""
        self.swap_folders: dict[str, SwapFolder] = {}
        """This rank's folder under each NVMe path of the plan, once `claim_swap_folders` has run."""
        self.mesh: RelationMesh | None = None
        """Groups of ranks that share out the relations, once `join_process_group` has run; None without them."""
        self.progress = Progress()
        """Says where this rank is."""
        self.swap_checksums: SwapChecksums | None = None
        """Checksums of this rank's swap files; None before `build_model`, and if nobody has asked for them."""
        self._sums = torch.zeros(4, dtype=torch.float64)

    def claim_swap_folders(self, run: Path) -> None:
        """Create and lock this rank's folders for swap files.

        Raises:
            InputError: if another process of the run uses them.
        """
        for path in {offload.nvme_path for offload in (self.plan.zero.offload_optimizer, self.plan.zero.offload_param)}:
            if path is not None:
                self.swap_folders[path] = SwapFolder(path, run, self.rank)

    def check_world_size(self) -> None:
        """Compare the launcher's WORLD_SIZE with the plan.

        Raises:
            InputError: if they differ.
        """
        planned = self.plan.cluster.world_size
        if self.world_size != planned:
            raise InputError(f"WORLD_SIZE: {self.world_size} is not allowed: must be {planned}, as planned")

    def join_process_group(self) -> None:
        """Join the process group: NCCL on GPUs, gloo on CPUs."""
        cuda = self.plan.cluster.device == "cuda"
        import deepspeed

        if cuda:
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        elif "GLOO_SOCKET_IFNAME" not in os.environ and (name := interface_towards(os.environ.get("MASTER_ADDR", ""))):
            os.environ["GLOO_SOCKET_IFNAME"] = name
        if not cuda:
            probe_one_op()
        deepspeed.init_distributed(dist_backend="nccl" if cuda else "gloo", timeout=COLLECTIVE_LIMIT)
        if self.plan.parallel.relation > 1:
            self.mesh = RelationMesh(self.plan.parallel.relation)
            compare_replicas(self.mesh)

    def deepspeed_config(self) -> dict[str, Any]:
        """Return DeepSpeed's configuration of the plan; without a compiler for GPUs the fused AdamW is torch's."""
        plan = self.plan
        if plan.training.adam == "fused" and not has_gpu_compiler():
            plan = plan.model_copy(update={"training": plan.training.model_copy(update={"adam": "torch"})})
        config = plan.deepspeed_config()
        for section in config.get("zero_optimization", {}).values():
            if isinstance(section, dict) and section.get("nvme_path") in self.swap_folders:
                section["nvme_path"] = str(self.swap_folders[section["nvme_path"]].path)
        return config

    def build_network(self) -> torch.nn.Module:
        """Build the network, without DeepSpeed."""
        group = None if self.mesh is None else self.mesh.group
        return build(self.plan.model, tile_relations=self.plan.tile_relations, relation_group=group)

    def build_model(self) -> None:
        """Build the network; under ZeRO-3 each parameter is partitioned as soon as it is made."""
        import deepspeed

        self.progress.move(Phase.INIT)
        answer_for_processor()
        ask_numa_once()
        if self.plan.zero.uses_nvme and checks_swap():
            self.swap_checksums = check_swap_files(self.rank)
        torch.manual_seed(self.plan.training.seed)
        with deepspeed.zero.Init(
            config_dict_or_path=self.deepspeed_config(),
            enabled=self.plan.zero.stage == 3,
            data_parallel_group=None if self.mesh is None else self.mesh.replicas,
            mpu=self.mesh,
        ):
            self.model = self.build_network()
        if self.mesh is not None:
            average_over_group(self.model, self.mesh)
            share_dropout(self.model)

    def initialize_engine(self) -> None:
        """Wrap the network in DeepSpeed's engine."""
        import deepspeed

        self.progress.move(Phase.INIT)
        # Each rank trains on its own samples, so it must draw its own dropout masks.
        torch.manual_seed(self.plan.training.seed + 1 + self.rank)
        model, self.model = self.model, None
        assert model is not None
        import_muon_uncompiled()
        leave_compiler_out()
        simplify_gpu_architectures()
        if self.plan.zero.offload_optimizer.device == "nvme":
            patch_nvme_optimizers()
        self.deepspeed_engine, *_ = deepspeed.initialize(
            model=model,
            model_parameters=model.parameters(),
            config=self.deepspeed_config(),
            mpu=self.mesh,
            optimizer=self._quantized_adam if self.plan.training.quantizes_states else None,
        )
        if self.mesh is not None:
            complete_norms(self.deepspeed_engine.optimizer, self.mesh)
        wait_without_limit()

    def compare_swap_files(self) -> None:
        """Compare the optimizer's swap files, which a checkpoint copies, with what was written, if they are checked.

        Raises:
            SwapChangedError: names a file that has changed.
        """
        if self.swap_checksums is not None:
            self.swap_checksums.compare_files(_OPTIMIZER_FOLDER)

    def forget_swap_files(self) -> None:
        """Forget what the optimizer's swap files hold: to load a checkpoint, DeepSpeed copies its files over them."""
        if self.swap_checksums is not None:
            self.swap_checksums.forget(_OPTIMIZER_FOLDER)

    def _quantized_adam(self, parameters: Any) -> torch.optim.Optimizer:
        """Return bitsandbytes' AdamW of the plan, whose moments have 8 bits per element."""
        from bitsandbytes.optim.adamw import AdamW8bit

        training = self.plan.training
        optimizer: torch.optim.Optimizer = AdamW8bit(
            parameters,
            lr=training.learning_rate,
            betas=training.betas,
            eps=training.epsilon,
            weight_decay=training.weight_decay,
        )
        return optimizer

    @property
    def module(self) -> torch.nn.Module:
        """The network with DeepSpeed's hooks."""
        module: torch.nn.Module = self.deepspeed_engine.module
        return module

    def forward(self, batch: Samples) -> Tensor:
        """Return the logits of a micro-batch."""
        inputs = batch.inputs.to(self.deepspeed_engine.device)
        if inputs.is_floating_point():
            inputs = inputs.to(MODEL_DTYPES[self.plan.training.precision])
        logits: Tensor = self.deepspeed_engine(inputs)
        return logits

    def loss(self, batch: Samples) -> Tensor:
        """Mean cross-entropy of a micro-batch."""
        training = self.plan.training
        self.progress.move(Phase.FORWARD)
        targets = batch.targets.to(self.deepspeed_engine.device)
        if training.chunks_loss:
            inputs = batch.inputs.to(self.deepspeed_engine.device)
            loss: Tensor = self.deepspeed_engine(inputs, targets, label_smoothing=training.label_smoothing)
            return loss
        return smoothed_cross_entropy(self.forward(batch).flatten(0, -2).float(), targets, training.label_smoothing)

    def scores(self, batch: Samples) -> tuple[Tensor, Tensor]:
        """Return the loss of each prediction of a micro-batch (S,), and whether it is right (1 or 2, S).

        A second row, for models of images with more than five classes, tells whether one of the five most likely
        classes is right.
        """
        self.progress.move(Phase.EVALUATION)
        targets = batch.targets.to(self.deepspeed_engine.device)
        if self.plan.training.chunks_loss:
            inputs = batch.inputs.to(self.deepspeed_engine.device)
            losses, right = self.deepspeed_engine(inputs, targets, scores=True)
            return losses, right[None] > 0
        logits, targets = self.forward(batch).flatten(0, -2).float(), targets.flatten()
        losses = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
        right = [logits.argmax(-1) == targets]
        if has_top5(self.plan.model):
            best = logits.topk(min(5, logits.shape[-1]), dim=-1).indices
            right.append((best == targets[:, None]).any(-1))
        return losses, torch.stack(right)

    def backward(self, loss: Tensor) -> None:
        """Add a micro-batch's gradients to those of its step."""
        self.progress.move(Phase.BACKWARD)
        self.deepspeed_engine.backward(loss)

    def micro_step(self) -> None:
        """End a micro-batch; after the last one of a step DeepSpeed clips and applies the gradients."""
        self.progress.move(Phase.STEP)
        self.deepspeed_engine.step()

    def set_learning_rate(self, learning_rate: float) -> None:
        """Set the learning rate of all parameters."""
        # With a partial offload, DeepSpeed has a second optimizer for the states that stay on the device.
        optimizer = self.deepspeed_engine.optimizer
        for own in (optimizer, getattr(optimizer, "backup_optimizer", None)):
            for group in own.param_groups if own else ():
                group["lr"] = learning_rate

    @property
    def learning_rate(self) -> float:
        """The learning rate of the newest step."""
        rate: float = self.deepspeed_engine.optimizer.param_groups[0]["lr"]
        return rate

    def gradient_norm(self) -> float | None:
        """Global gradient norm of the newest step as DeepSpeed returns it: -1 on overflow, None if not computed."""
        norm = self.deepspeed_engine.get_global_grad_norm()
        return None if norm is None else float(norm)

    @property
    def overflowed(self) -> bool:
        """True if DeepSpeed skipped the newest step because a gradient was not finite."""
        return bool(getattr(self.deepspeed_engine.optimizer, "overflow", False))

    @property
    def loss_scale(self) -> float:
        """Factor by which DeepSpeed scales the loss; 1 where it does not."""
        return float(getattr(self.deepspeed_engine.optimizer, "loss_scale", None) or 1.0)

    def seed_step(self, step: int) -> None:
        """Seed torch for a step, so that dropout depends only on the step and the rank: a resumed run repeats it."""
        self.progress.begin_step(step)
        torch.manual_seed((self.plan.training.seed * self.world_size + self.rank + 1) * 1_000_003 + step)

    def mean_over_ranks(self, *values: float) -> list[float]:
        """Mean of each value over all ranks."""
        # gloo's thread releases a tensor some time after the call, perhaps within a measured phase. Reusing one tensor
        # keeps that out of the measurement.
        sums = self._sums.to(self.deepspeed_engine.device)[: len(values)]
        sums.copy_(torch.tensor(values, dtype=torch.float64))
        torch.distributed.all_reduce(sums)
        return [value / self.world_size for value in sums.tolist()]
