"""ZeRO stage, knobs and offload: `ZeroSpec`."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Literal, TypeAlias

from pydantic import Field, model_validator

from ..common.errors import InputError, nearest
from ..common.schema import Schema
from ..common.types import Line, NonNegative, Positive

OffloadDevice: TypeAlias = Literal["none", "cpu", "nvme"]


class OffloadMode(StrEnum):
    """What is offloaded from the device (nothing, the optimizer, or optimizer and parameters), and where to."""

    NONE = "none"
    CPU_OPTIMIZER = "cpu-optimizer"
    CPU = "cpu"
    NVME_OPTIMIZER = "nvme-optimizer"
    NVME = "nvme"

    @property
    def optimizer_device(self) -> OffloadDevice:
        """Device of the optimizer states: ``offload_optimizer.device`` of DeepSpeed."""
        return "none" if self is OffloadMode.NONE else "nvme" if self.uses_nvme else "cpu"

    @property
    def param_device(self) -> OffloadDevice:
        """Device of the parameters: ``offload_param.device`` of DeepSpeed."""
        return "cpu" if self is OffloadMode.CPU else "nvme" if self is OffloadMode.NVME else "none"

    @property
    def uses_nvme(self) -> bool:
        """True if anything is offloaded to NVMe."""
        return self in (OffloadMode.NVME, OffloadMode.NVME_OPTIMIZER)

    @classmethod
    def parse(cls, text: str) -> OffloadMode:
        """Return the mode of a name.

        Raises:
            InputError: for an unknown name.
        """
        try:
            return cls(text)
        except ValueError:
            names = [mode.value for mode in cls]
            allowed = f"{', '.join(names)}{nearest(text, names)}"
            raise InputError(f"offload: {text!r} is not allowed: must be one of {allowed}") from None


def _check_path(offload: OffloadOptimizer | OffloadParam) -> None:
    if offload.device == "nvme" and not offload.nvme_path:
        raise ValueError("nvme_path: is required with device nvme")


class OffloadOptimizer(Schema):
    """Offload of the optimizer states, the master copy and the step's gradients."""

    device: OffloadDevice = "none"
    ratio: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Fraction of the sub-groups whose states are offloaded; the first sub-groups stay on the device."""
    pin_memory: bool = True
    """Pin the host's gradient buffers."""
    buffer_count: Positive = 4
    """Number of pinned buffers for swapping states to NVMe, each of the largest sub-group's size."""
    pipeline_read: bool = False
    """Read the next sub-group from NVMe during an update."""
    pipeline_write: bool = False
    """Write the last sub-group to NVMe during an update."""
    nvme_path: Line | None = None
    """A folder on every node's NVMe drive."""

    @model_validator(mode="after")
    def _check(self) -> OffloadOptimizer:
        _check_path(self)
        if self.device == "nvme":
            least = min_buffers(self.pipeline_read, self.pipeline_write)
            if self.buffer_count < least:
                raise ValueError(f"buffer_count: {self.buffer_count} is not allowed: must be at least {least}")
        if self.ratio < 1 and self.device != "cpu":
            raise ValueError(f"ratio: {self.ratio} is not allowed: must be 1 unless the device is cpu")
        return self


def min_buffers(pipeline_read: bool, pipeline_write: bool) -> int:
    """Minimum number of buffers for swapping the optimizer to NVMe.

    A sub-group's parameters, gradients and two moments take one buffer each. Pipelined reading and pipelined writing
    need four more each. Source: runs of DeepSpeed 0.19.8 with AdamW.
    """
    return 4 * (1 + pipeline_read + pipeline_write)


class OffloadParam(Schema):
    """Offload of a rank's partitions of the parameters."""

    device: OffloadDevice = "none"
    pin_memory: bool = False
    """Pin each partition before it is copied into the flat buffer, which is always pinned."""
    buffer_count: Positive = 5
    """Number of pinned buffers for partitions read from NVMe; every gathered parameter holds one."""
    buffer_elements: Positive = 100_000_000
    """Elements of one buffer, at least those of the largest partition."""
    max_in_cpu_elements: NonNegative = 0
    """Elements of a rank's partitions that stay on the host before NVMe is used."""
    nvme_path: Line | None = None
    """A folder on every node's NVMe drive."""

    @model_validator(mode="after")
    def _check(self) -> OffloadParam:
        _check_path(self)
        return self


ShardingEngine: TypeAlias = Literal["deepspeed", "fsdp2"]
"""What shards parameters, gradients and states: DeepSpeed's ZeRO, or torch's FSDP2 (``fully_shard``)."""


class ZeroSpec(Schema):
    """The ZeRO stage and the knobs that determine its memory; sizes are in elements, as in DeepSpeed."""

    engine: ShardingEngine = "deepspeed"
    """FSDP2 shards as stage 3 does. Of the other knobs it has one: it prefetches if `prefetch_bucket_elements` is not
    0, one tile or block in backward."""
    stage: Literal[0, 1, 2, 3] = 3
    reduce_bucket_elements: Positive = 500_000_000
    prefetch_bucket_elements: NonNegative = 0
    max_live_elements: Positive = 1_000_000_000
    max_reuse_distance_elements: NonNegative = 0
    persistence_threshold_elements: NonNegative = 100_000
    sub_group_elements: Positive = 100_000_000
    overlap_comm: bool = False
    """Overlap reductions and prefetched gathers with computation, on other GPU streams."""
    hpz_ranks: Positive = 1
    """Ranks of a group that holds a second copy of the parameters, partitioned among them: ZeRO++'s hpZ. After a step's
    first forward pass, gathers stay within the group, which is a node. 1 disables it."""
    quantized_weights: bool = False
    """Gather parameters over all ranks in 8-bit integers: ZeRO++'s qwZ."""
    quantized_gradients: bool = False
    """Reduce gradients in 4-bit integers: ZeRO++'s qgZ."""
    offload_optimizer: OffloadOptimizer = OffloadOptimizer()
    offload_param: OffloadParam = OffloadParam()

    @model_validator(mode="after")
    def _check_offload(self) -> ZeroSpec:
        optimizer, param = self.offload_optimizer, self.offload_param
        # DeepSpeed accepts each of these and then ignores it, or fails in the first step.
        if self.stage < 3 and param.device != "none":
            raise ValueError(f"offload_param: {param.device!r} is not allowed: must be none below stage 3")
        if self.stage < 3 and optimizer.device == "nvme":
            raise ValueError("offload_optimizer: 'nvme' is not allowed: must be none or cpu below stage 3")
        if self.stage == 0 and optimizer.device != "none":
            raise ValueError(f"offload_optimizer: {optimizer.device!r} is not allowed: must be none at stage 0")
        if self.stage < 3 and self.zero_plus_plus:
            raise ValueError(f"{self.zero_plus_plus} is not allowed: must be at its default below stage 3")
        if self.zero_plus_plus and param.device != "none":
            raise ValueError(f"{self.zero_plus_plus} is not allowed: must be at its default with offloaded parameters")
        if self.uses_fsdp2 and (self.stage < 3 or self.offloads or self.zero_plus_plus):
            raise ValueError("engine: 'fsdp2' is not allowed: must be deepspeed below stage 3, with offload or ZeRO++")
        if self.stage < 3 and optimizer.ratio < 1:
            raise ValueError(f"offload_optimizer.ratio: {optimizer.ratio} is not allowed: must be 1 below stage 3")
        return self

    @property
    def zero_plus_plus(self) -> str:
        """The first field of ZeRO++ that is set, with its value; empty if none is."""
        values = {
            "hpz_ranks": self.hpz_ranks > 1,
            "quantized_weights": self.quantized_weights,
            "quantized_gradients": self.quantized_gradients,
        }
        return next((f"{name}: {getattr(self, name)}" for name, is_set in values.items() if is_set), "")

    @property
    def uses_fsdp2(self) -> bool:
        """True if torch's FSDP2 shards."""
        return self.engine == "fsdp2"

    @property
    def name(self) -> str:
        """The engine with its stage: ``FSDP2`` or ``ZeRO-3``."""
        return "FSDP2" if self.uses_fsdp2 else f"ZeRO-{self.stage}"

    @property
    def offloads(self) -> bool:
        """True if anything is offloaded."""
        return self.offload_optimizer.device != "none" or self.offload_param.device != "none"

    @property
    def uses_nvme(self) -> bool:
        """True if anything is offloaded to NVMe."""
        return "nvme" in (self.offload_optimizer.device, self.offload_param.device)
