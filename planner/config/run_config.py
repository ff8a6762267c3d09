"""`RunConfig` joins a model, a cluster, the training and ZeRO. Every prediction is made for one `RunConfig`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from ..common.errors import InputError
from ..hardware.cluster import ClusterSpec
from .model import ModelSpec
from .parallel import NOT_PARALLEL, ParallelSpec
from .training import TrainingSpec
from .zero import ZeroSpec


@dataclass(frozen=True, slots=True)
class RunConfig:
    """One way to train one model on one cluster.

    Memory, time and plans are all predicted for a `RunConfig`. It is hashable, so predictions can be cached by it.
    """

    model: ModelSpec
    cluster: ClusterSpec
    training: TrainingSpec
    zero: ZeroSpec
    tile_relations: int | None = None
    """Relations per tile of a table; None keeps tables whole."""
    parallel: ParallelSpec = NOT_PARALLEL

    def __post_init__(self) -> None:
        """Choose what updates the states of adamw.

        Raises:
            InputError: if DeepSpeed's fused kernel is asked for on CPU ranks, a chunked loss for an image model, or a
                group of hpZ that does not divide a node, or what does not train under FSDP2 or with relation
                parallelism.
        """
        training = self.training
        if self.parallel.relation > 1:
            self._check_relation_parallel()
        if self.zero.uses_fsdp2:
            self._check_fsdp2()
        if training.chunks_loss and self.model.family != "gpt":
            raise InputError("loss: 'chunked' is not allowed: must be whole for a model of images")
        group, per_node = self.zero.hpz_ranks, self.cluster.ranks_per_node
        if group > 1 and (per_node % group or group == self.world_size):
            raise InputError(
                f"hpz_ranks: {group} is not allowed: must divide the {per_node} ranks of one of several nodes"
            )
        if self.on_cpu and (self.zero.quantized_weights or self.zero.quantized_gradients):
            raise InputError(f"{self.zero.zero_plus_plus} is not allowed: CPU ranks have no kernels for quantization")
        if self.on_cpu and training.adam == "fused":
            raise InputError("adam: 'fused' is not allowed: must be auto, torch or loop on CPU ranks")
        if training.adam == "auto" and training.optimizer == "adamw":
            resolved = training.model_copy(update={"adam": "loop" if self.on_cpu else "fused"})
            object.__setattr__(self, "training", resolved)

    def _check_fsdp2(self) -> None:
        training = self.training
        allowed = (
            ("optimizer", training.optimizer, ("adamw",)),
            ("adam", training.adam, ("auto", "fused", "torch", "loop")),
            ("precision", training.precision, ("fp32", "bf16")),
            ("torch_autocast", training.torch_autocast, (None,)),
            ("bf16_master", training.bf16_master, (False,)),
            ("loss", training.loss, ("whole",)),
            ("checkpointing", self.model.checkpointing, ("none", "block")),
        )
        for name, value, values in allowed:
            if value not in values:
                texts = " or ".join(map(str, values))
                raise InputError(f"{name}: {value!r} is not allowed: must be {texts} under FSDP2")

    def _check_relation_parallel(self) -> None:
        ranks, model = self.parallel.relation, self.model
        subject = f"relation_parallel: {ranks} is not allowed: must"
        if self.world_size % ranks:
            raise InputError(f"{subject} divide the number of ranks {self.world_size}")
        if not {"translution", "alpha"} & set(model.layer_operators):
            raise InputError(f"{subject} be 1 for a model without relation tables")
        if ranks > model.geometry.relations:
            raise InputError(f"{subject} be at most the number of relations {model.geometry.relations}")
        if self.zero.uses_fsdp2 or self.zero.zero_plus_plus:
            engine = "FSDP2" if self.zero.uses_fsdp2 else self.zero.zero_plus_plus
            raise InputError(f"{subject} be 1 with {engine}")

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.cluster.world_size

    @property
    def replicas(self) -> int:
        """Ranks that own the same relations, D, over which ZeRO partitions: all ranks without relation parallelism."""
        return self.world_size // self.parallel.relation

    @property
    def global_batch(self) -> int:
        """Samples of one optimizer step over all ranks."""
        return self.training.global_batch(self.world_size)

    @property
    def on_cpu(self) -> bool:
        """True if ranks compute on the CPU, so that a rank's device memory is host memory."""
        return self.cluster.device == "cpu"

    def replace(self, **changes: Any) -> RunConfig:
        """Return a copy with some fields replaced."""
        return dataclasses.replace(self, **changes)
