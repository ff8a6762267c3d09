"""`RunConfig`: a model, a cluster, a training, ZeRO and a tile size; every prediction is made for one of them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from .config.model import ModelSpec
from .config.training import TrainingSpec
from .config.zero import ZeroSpec
from .hardware.cluster import ClusterSpec


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

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.cluster.world_size

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
