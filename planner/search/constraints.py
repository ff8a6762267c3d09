"""What the user fixes before a search."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias

from pydantic import Field

from ..common.schema import Schema, stored_as
from ..config.model import Positive

Stage: TypeAlias = Literal[0, 1, 2, 3]

Objective: TypeAlias = Literal["time", "nodes", "cost", "memory"]

Checkpointing: TypeAlias = Literal["none", "block", "offload"]

HEADROOM = 0.08

SAMPLES_PER_RANK = 8
"""Of an optimizer step, where the user says nothing."""


class SearchConstraints(Schema):
    """What the user has decided; None leaves it to the search."""

    global_batch: Positive | None = None
    """Samples per optimizer step over all ranks; else 8 per rank, or what batch and accumulation make."""
    micro_batch: Positive | None = None
    gradient_accumulation_steps: Positive | None = stored_as("accumulation", None)
    stage: Stage | None = None
    offload: str | None = None
    """One of none, cpu-optimizer, cpu, nvme-optimizer and nvme."""
    offload_ratio: Annotated[float, Field(gt=0, le=1)] | None = None
    nvme_path: str | None = None
    """A folder on every node's NVMe drive; without one nothing is put there."""
    checkpointing: Checkpointing | None = None
    tile_relations: Positive | None = None
    all_nodes: bool = False
    """Use every node of the cluster, rather than as many as are best."""
    headroom: Annotated[float, Field(ge=0, lt=1)] = HEADROOM
    """Share of every memory that is to stay free."""
    minimize: Objective = "time"
    """The time of a sample; or the nodes, the cost of a sample, or the memory of a device."""
    zero_overrides: dict[str, Any] = Field(default_factory=dict)
    """Fields of `ZeroSpec`, as in `make_plan`."""
