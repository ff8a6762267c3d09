"""`SearchConstraints`: what the user fixes before a search, and what the search minimizes."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias

from pydantic import Field

from ..common.schema import Schema, stored_as
from ..common.types import Positive
from ..hardware.cluster import ClusterSpec

Stage: TypeAlias = Literal[0, 1, 2, 3]
Objective: TypeAlias = Literal["time", "nodes", "cost", "memory"]
Checkpointing: TypeAlias = Literal["none", "block", "offload"]

HEADROOM = 0.08
"""Default fraction of every memory that stays free."""
SAMPLES_PER_RANK = 8
"""Default samples per rank and optimizer step."""


class SearchConstraints(Schema):
    """What the user fixes; None leaves a choice to the search."""

    global_batch: Positive | None = None
    """Samples of an optimizer step over all ranks; None is micro-batch times accumulation, or 8 per rank."""
    micro_batch: Positive | None = None
    """Samples per rank and forward pass."""
    gradient_accumulation_steps: Positive | None = stored_as("accumulation", None)
    """Micro-batches per optimizer step."""
    stage: Stage | None = None
    """ZeRO stage."""
    offload: str | None = None
    """Offload mode: none, cpu-optimizer, cpu, nvme-optimizer or nvme."""
    offload_ratio: Annotated[float, Field(gt=0, le=1)] | None = None
    """Fraction of the optimizer's sub-groups that are offloaded."""
    nvme_path: str | None = None
    """A folder on every node's NVMe drive; None rules out the nvme modes."""
    checkpointing: Checkpointing | None = None
    """Activation checkpointing."""
    tile_relations: Positive | None = None
    """Relations per tile."""
    all_nodes: bool = False
    """Use every node of the cluster instead of the best number."""
    headroom: Annotated[float, Field(ge=0, lt=1)] = HEADROOM
    """Fraction of every memory that stays free."""
    minimize: Objective = "time"
    """What the search minimizes: the time of a sample, the nodes, the cost of a sample, or device memory."""
    zero_overrides: dict[str, Any] = Field(default_factory=dict)
    """Fields of `ZeroSpec` that replace the search's choice, as in `make_plan`."""


def resolve_global_batch(constraints: SearchConstraints, cluster: ClusterSpec) -> int:
    """Samples of an optimizer step: as given, or micro-batch times accumulation times ranks, or 8 per rank."""
    if constraints.global_batch is not None:
        return constraints.global_batch
    micro_batch = constraints.micro_batch or SAMPLES_PER_RANK
    return micro_batch * (constraints.gradient_accumulation_steps or 1) * cluster.world_size
