"""ZeRO stage, offload and knobs."""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

from pydantic import Field, model_validator

from ..common.schema import Schema
from .model import Positive
from .training import NonNegative

OffloadDevice: TypeAlias = Literal["none", "cpu", "nvme"]


def _check_path(offload: OffloadOptimizer | OffloadParam) -> None:
    if offload.device == "nvme" and not offload.nvme_path:
        raise ValueError("nvme_path: is required with device nvme")


class OffloadOptimizer(Schema):
    """Where the optimizer's states, master copy and gradients lie between steps."""

    device: OffloadDevice = "none"
    ratio: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the sub-groups whose states lie on the host; the first ones stay on the device."""
    pin_memory: bool = True
    """Lock the host's buffers of gradients in memory."""
    buffer_count: Positive = 4
    """Locked buffers, each of the largest sub-group's size, through which states go to NVMe."""
    pipeline_read: bool = False
    """Read the next sub-group from NVMe while one is updated."""
    pipeline_write: bool = False
    """Write the last sub-group to NVMe while one is updated."""
    nvme_path: str | None = None
    """A folder on the NVMe drive of every node."""

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
    """Fewest buffers with which the optimizer's swapping to NVMe does not run dry.

    A sub-group's parameters, gradients and two moments take one each; reading and writing ahead
    take as many again. Source: runs of DeepSpeed 0.19.8 with AdamW.
    """
    return 4 * (1 + pipeline_read + pipeline_write)


class OffloadParam(Schema):
    """Where a rank's shares of the parameters lie while they are not gathered."""

    device: OffloadDevice = "none"
    pin_memory: bool = False
    """Lock each share before it is copied into the flat buffer, which is locked in any case."""
    buffer_count: Positive = 5
    """Locked buffers for shares read from NVMe, of which every gathered parameter holds one."""
    buffer_elements: Positive = 100_000_000
    """Size of such a buffer, at least the largest share."""
    max_in_cpu_elements: NonNegative = 0
    """Elements of a rank's shares that stay on the host before NVMe is used."""
    nvme_path: str | None = None
    """A folder on the NVMe drive of every node."""

    @model_validator(mode="after")
    def _check(self) -> OffloadParam:
        _check_path(self)
        return self


class ZeroSpec(Schema):
    """The ZeRO stage and the knobs that rule its memory, in elements as DeepSpeed counts them."""

    stage: Literal[0, 1, 2, 3] = 3
    reduce_bucket_elements: Positive = 500_000_000
    prefetch_bucket_elements: NonNegative = 0
    max_live_elements: Positive = 1_000_000_000
    max_reuse_distance_elements: NonNegative = 0
    persistence_threshold_elements: NonNegative = 100_000
    sub_group_elements: Positive = 100_000_000
    overlap_comm: bool = False
    """Reduce and, with prefetch, gather beside the computation, on a GPU's other streams."""
    offload_optimizer: OffloadOptimizer = OffloadOptimizer()
    offload_param: OffloadParam = OffloadParam()

    @model_validator(mode="after")
    def _check_offload(self) -> ZeroSpec:
        optimizer, param = self.offload_optimizer, self.offload_param
        # DeepSpeed accepts each of these, and then ignores it or fails in the first step.
        if self.stage < 3 and param.device != "none":
            raise ValueError(f"offload_param: {param.device!r} is not allowed: must be none below stage 3")
        if self.stage < 3 and optimizer.device == "nvme":
            raise ValueError("offload_optimizer: 'nvme' is not allowed: must be none or cpu below stage 3")
        if self.stage == 0 and optimizer.device != "none":
            raise ValueError(f"offload_optimizer: {optimizer.device!r} is not allowed: must be none at stage 0")
        if self.stage < 3 and optimizer.ratio < 1:
            raise ValueError(f"offload_optimizer.ratio: {optimizer.ratio} is not allowed: must be 1 below stage 3")
        return self

    @property
    def offloads(self) -> bool:
        """Whether anything lies off the device."""
        return self.offload_optimizer.device != "none" or self.offload_param.device != "none"

    @property
    def uses_nvme(self) -> bool:
        """Whether anything lies on NVMe."""
        return "nvme" in (self.offload_optimizer.device, self.offload_param.device)
