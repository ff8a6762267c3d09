"""Memory of a rank in closed form: never less than the ledger's peaks, in a fraction of the time.

A search asks this of thousands of plans, and replays the life (simulation.py) of those it would take. Every term is
the one of the twin of the same stage; what the twins let meet at different moments is added up here.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import ceil

from ..config.model import ModelSpec
from ..config.training import DTYPE_BYTES, TrainingSpec
from ..config.zero import ZeroSpec
from ..costs.comm_volume import Volumes, volumes
from ..costs.optimizer_state import moments, temporary_tensors, widths
from ..costs.parameters import TABLES, parameter_groups
from ..deepspeed.config import NVME_BLOCK_BYTES
from ..hardware.cluster import ClusterSpec
from ..simulator.core.storage import MemoryTracker
from ..simulator.core.tiers import next_power_of_two
from ..simulator.engine.base import NORM_BYTES, SIMULATED_MICRO_BATCHES
from ..simulator.engine.partition import ALIGNMENT_BYTES, ceil_div
from ..simulator.engine.stage3 import NORM_ELEMENTS
from ..simulator.network.model import MICRO_BATCHES, SimulatedNetwork, replay, sample_bytes
from ..simulator.network.ops import WEIGHT_GRADIENTS, DtypeSizes

FP32 = 4
SLACK_BYTES = 2**20
"""Scalars, padding and alignment of some buffers."""


@dataclass(slots=True)
class MemoryUpperBound:
    """Of one rank, in bytes; a CPU rank's device is the host."""

    device: int = 0
    host: int = 0
    pinned: int = 0
    nvme: int = 0
    states: int = 0
    """Of those on the device, what stays between steps."""
    activations: int = 0
    """Of those on the device, what a micro-batch's replay needs."""
    passing: int = 0
    """Of those on the host, the most that comes and goes at a time."""

    def add_transient(self, size: int) -> None:
        """So much comes and goes on the host, at another time than what did before."""
        self.passing = max(self.passing, size)

    def close(self, worst: int, *, on_cpu: bool) -> MemoryUpperBound:
        """Add what comes and goes to what stays; a CPU rank has all but pinned buffers and files on one tier."""
        self.states = self.device + (self.host if on_cpu else 0)
        self.device += worst
        self.host += self.passing
        if on_cpu:
            self.device, self.host = self.device + self.host, 0
        return self


@dataclass(frozen=True, slots=True)
class _Plan:
    """What a bound is taken of, and the sizes that several terms need."""

    spec: ModelSpec
    cluster: ClusterSpec
    training: TrainingSpec
    zero: ZeroSpec
    volumes: Volumes
    module: int
    """Elements of the module that is gathered together."""
    largest: int
    """Elements of the largest tensor."""
    activations: tuple[int, int]

    @property
    def width(self) -> int:
        return self.training.dtype_bytes

    @property
    def wide(self) -> int:
        return widths(self.training)[0]

    @property
    def state(self) -> int:
        return widths(self.training)[1] * moments(self.training)

    @property
    def accumulated(self) -> int:
        return DTYPE_BYTES[self.training.accumulation_dtype]

    @property
    def on_cpu(self) -> bool:
        return self.cluster.device == "cpu"

    @property
    def offloaded(self) -> bool:
        return self.zero.offload_optimizer.device != "none"

    @property
    def locks(self) -> bool:
        return self.offloaded and self.zero.offload_optimizer.pin_memory and not self.on_cpu

    @property
    def share(self) -> int:
        return self.volumes.share

    @property
    def group(self) -> int:
        """Elements of the largest sub-group, at most."""
        return min(self.share, self.zero.sub_group_elements + ceil_div(self.largest, self.cluster.world_size))

    @property
    def staying(self) -> int:
        """Elements whose states stay on the device."""
        ratio = self.zero.offload_optimizer.ratio
        if not self.offloaded:
            return self.share
        if ratio == 1:
            return 0
        # Groups are about equal, and cut where tensors end.
        return min(self.share, int((1 - ratio) * self.share) + 2 * self.group)


SHALLOW, DEEP = 12, 24
"""Numbers of equal layers from which those of a deeper network follow: each further one keeps as much."""


@lru_cache(maxsize=256)
def _replayed(spec: ModelSpec, batch: int, widths: DtypeSizes) -> int:
    """The most that is live on the device in a replayed micro-batch with whole tables."""
    memory = MemoryTracker(ignored=frozenset({WEIGHT_GRADIENTS, MICRO_BATCHES}))
    peaks = replay(spec, batch, widths, memory=memory).memory.peaks
    return max(peak.total_bytes for peak in peaks.values())


def _activations(spec: ModelSpec, batch: int, widths: DtypeSizes) -> tuple[int, int]:
    """Activations of a micro-batch on the device and on the host."""
    kept = spec.depth * batch * spec.tokens * spec.dim * widths.value
    away = kept if spec.checkpointing == "offload" else 0
    if spec.depth <= DEEP or len(set(spec.layer_operators)) > 1:
        return _replayed(spec, batch, widths), away
    shallow, deep = (
        _replayed(spec.model_copy(update={"depth": depth, "relative_layers": "all"}), batch, widths)
        for depth in (SHALLOW, DEEP)
    )
    # A block keeps its input at least; in a shallow network the head may hide it.
    least = kept / spec.depth if widths.device == "cpu" or not away else 0.0
    each = max((deep - shallow) / (DEEP - SHALLOW), least)
    return deep + ceil(each * (spec.depth - DEEP)), away


@lru_cache(maxsize=1024)
def activation_bytes(spec: ModelSpec, batch: int, widths: DtypeSizes) -> tuple[int, int]:
    """Activations of a micro-batch on the device and on the host; interpolated between powers of four.

    Replays take milliseconds each, and what they find grows all but linearly with the batch.
    """
    low = 1
    while low * 4 <= batch:
        low *= 4
    first = _activations(spec, low, widths)
    if batch == low:
        return first
    second = _activations(spec, low * 4, widths)
    share = (batch - low) / (3 * low)
    between = [round(a + share * (b - a)) for a, b in zip(first, second, strict=True)]
    return between[0], between[1]


@lru_cache(maxsize=256)
def _buffers(spec: ModelSpec, widths: DtypeSizes) -> int:
    return SimulatedNetwork(spec, 1, widths).buffer_bytes


@lru_cache(maxsize=512)
def _modules(spec: ModelSpec, tile_relations: int | None) -> tuple[int, int]:
    """Elements of the largest module, and of the largest tensor that is made."""
    both = 2 if len({"q", "k"} & set(spec.roles)) == 2 and spec.operator != "absolute" else 1
    groups = parameter_groups(spec, tile_relations)
    # A layer's own bias is gathered with its weight.
    largest = max(group.numel * both if group.component == TABLES else group.numel + group.shape[0] for group in groups)
    return largest, max(group.numel for group in groups)


def bound_memory(
    spec: ModelSpec, cluster: ClusterSpec, training: TrainingSpec, zero: ZeroSpec, tile_relations: int | None
) -> MemoryUpperBound:
    """Memory of one rank.

    Args:
        spec: the model.
        cluster: gives the number of ranks and the device.
        training: precision, batch and optimizer.
        zero: stage, knobs and offload.
        tile_relations: relations per tile; None keeps tables whole.
    """
    sizes = DtypeSizes.of(training.dtype_bytes, cluster.device)
    samples = sample_bytes(spec) * training.micro_batch
    on_device, on_host = activation_bytes(spec, training.micro_batch, sizes)
    activations = (
        on_device + _buffers(spec, sizes) + samples + SLACK_BYTES,
        on_host + samples * training.gradient_accumulation_steps,
    )
    v = volumes(spec, tile_relations, cluster.world_size, zero.persistence_threshold_elements)
    plan = _Plan(spec, cluster, training, zero, v, *_modules(spec, tile_relations), activations)
    bounds = MemoryUpperBound(activations=activations[0], host=activations[1])
    if zero.stage == 0:
        return _stage_0(plan, bounds)
    if zero.stage < 3:
        return _stages_1_and_2(plan, bounds)
    _parameters(plan, bounds)
    _states(plan, bounds)
    return bounds.close(max(_running(plan), _updating(plan)), on_cpu=plan.on_cpu)


def _parameters(plan: _Plan, bounds: MemoryUpperBound) -> None:
    """A rank's shares of the parameters, what is whole throughout, and the bucket."""
    width, zero, share = plan.width, plan.zero, plan.share
    param, bucket = zero.offload_param, zero.reduce_bucket_elements * width
    bounds.device += plan.volumes.persistent * width + bucket
    if zero.overlap_comm and not plan.on_cpu:
        bounds.device += 2 * (plan.largest * width + bucket)
    if param.device == "none":
        bounds.device += share * width
        bounds.add_transient(0 if plan.on_cpu else share * width)
    elif param.device == "cpu" and plan.on_cpu:
        bounds.host += share * width
        bounds.add_transient(share * width)
    elif param.device == "cpu":
        bounds.pinned += next_power_of_two(share * width) + (2 * share * width if param.pin_memory else 0)
        bounds.add_transient(share * width)
    else:
        bounds.pinned += param.buffer_count * (param.buffer_elements * width + ALIGNMENT_BYTES)
        bounds.pinned += plan.group * plan.cluster.world_size * width + ALIGNMENT_BYTES * plan.volumes.tensors
        bounds.nvme += share * width
        bounds.host += plan.volumes.small[width == FP32] * width


def _states(plan: _Plan, bounds: MemoryUpperBound) -> None:
    """Master copy, moments, accumulated gradients and those of the step, wherever they lie."""
    wide, share, staying, optimizer = plan.wide, plan.share, plan.staying, plan.zero.offload_optimizer
    held, group = plan.wide + plan.state, plan.group
    if not plan.offloaded:
        bounds.device += share * (held + plan.accumulated)
        bounds.add_transient(share * held)
        bounds.add_transient(0 if plan.on_cpu else group * FP32)
        return
    accumulated, steps = share * plan.accumulated, share * wide
    if optimizer.device == "nvme":
        bounds.pinned += optimizer.buffer_count * (group * FP32 + ALIGNMENT_BYTES)
        bounds.nvme += share * (held + FP32)
        bounds.host += accumulated
        bounds.add_transient(group * max(plan.state, plan.width + wide))
        # What has no file stays: small gradients where they are made, small sub-groups on the host.
        times = min(plan.training.gradient_accumulation_steps, SIMULATED_MICRO_BATCHES)
        bounds.device += plan.volumes.small[1] * wide * times
        swapped = plan.zero.sub_group_elements * wide >= NVME_BLOCK_BYTES
        rest = min(share, NVME_BLOCK_BYTES // wide) if swapped else share
        bounds.host += rest * (held + wide)
        bounds.add_transient(rest * wide)
        return
    bounds.device += staying * (held + wide)
    if plan.locks:
        bounds.pinned += next_power_of_two(accumulated) + 2 * steps
        bounds.add_transient(accumulated)
    else:
        bounds.host += accumulated + steps
    # A share of the groups stays: at least as much as whole groups allow.
    away = share if optimizer.ratio == 1 else min(share, round(share * optimizer.ratio) + group)
    bounds.host += away * held
    bounds.add_transient(share * held - (0 if optimizer.ratio < 1 else share * plan.state))
    bounds.add_transient(group * (plan.width + wide))


def _running(plan: _Plan) -> int:
    """Activations, whole modules and their gradients, and the copies of collectives."""
    zero, world_size, module, width = plan.zero, plan.cluster.world_size, plan.module, plan.width
    ahead = reused = 0
    if zero.prefetch_bucket_elements:
        ahead = 2 * min(zero.max_live_elements + module, zero.prefetch_bucket_elements + module)
    if zero.max_reuse_distance_elements:
        reused = min(plan.volumes.gathered, zero.max_reuse_distance_elements + module)
    whole = (module + ahead + reused) * width
    # A tile of logits is two tensors, gathered in one buffer and copied out of it.
    coordinator = (module + (module if plan.on_cpu else ceil_div(module, world_size))) * width
    reduced = max(zero.reduce_bucket_elements, plan.largest)
    share = ceil_div(reduced, world_size) * (plan.accumulated + plan.wide)
    share += min(ceil_div(plan.largest, world_size), NORM_ELEMENTS) * NORM_BYTES if plan.offloaded else 0
    reducing = module * width + reduced * width * (2 if plan.on_cpu else 1) + share
    return plan.activations[0] + whole + max(coordinator, reducing)


def _updating(plan: _Plan) -> int:
    """The update of a sub-group; or a module that is being made."""
    temporary = temporary_tensors(plan.training, offloaded=plan.offloaded and plan.zero.offload_optimizer.ratio == 1)
    gradients = 0 if plan.offloaded else plan.accumulated + plan.wide
    update = plan.group * (temporary * plan.wide + gradients)
    update += ceil_div(plan.largest, plan.cluster.world_size) * NORM_BYTES
    return max(update, plan.largest * FP32 + plan.module * plan.width)


def _stage_0(plan: _Plan, bounds: MemoryUpperBound) -> MemoryUpperBound:
    elements, width, wide = plan.volumes.elements, plan.width, plan.wide
    master = wide if width != wide else 0
    temporary = temporary_tensors(plan.training, offloaded=False, one_by_one=True)
    bounds.device += elements * (width + master + plan.state)
    gradients = elements * width
    reducing = plan.activations[0] + 2 * gradients
    updating = gradients + elements * wide + temporary * plan.largest * wide if master else gradients
    bounds.add_transient(elements * max(FP32 + width, width + wide + plan.state))
    return bounds.close(max(reducing, updating + temporary * plan.largest * wide), on_cpu=plan.on_cpu)


def _stages_1_and_2(plan: _Plan, bounds: MemoryUpperBound) -> MemoryUpperBound:
    zero, training, world_size, largest = plan.zero, plan.training, plan.cluster.world_size, plan.largest
    width, wide, elements = plan.width, plan.wide, plan.volumes.elements
    share = ceil_div(elements, 2 * world_size) * 2
    # Elements of every parameter of which the rank owns a part.
    own = min(elements, share + 2 * largest)
    bucket = zero.reduce_bucket_elements * width * (2 if zero.overlap_comm and not plan.on_cpu else 1)
    bounds.device += world_size * share * width
    several = training.gradient_accumulation_steps > 1
    gradients = (elements if zero.stage == 1 else 2 * largest) * width
    if plan.offloaded:
        pieces = [share * wide, share * wide, share * width, largest * width, own * width * several]
        bounds.pinned += sum(map(next_power_of_two, pieces)) if plan.locks else 0
        bounds.host += share * plan.state + (0 if plan.locks else sum(pieces))
        bounds.device += largest * width
        parts, update = largest * NORM_BYTES, 0
        bounds.add_transient(2 * share * wide)
    else:
        temporary = temporary_tensors(training, offloaded=False)
        bounds.device += share * (wide + plan.state)
        added = plan.accumulated if several or plan.accumulated != width else 0
        parts = own * (width + added)
        update = share * (plan.accumulated + wide + temporary * wide)
        bounds.add_transient(share * (2 * wide + plan.state))
    gathered = world_size * share * width if plan.on_cpu else 0
    worst = max(plan.activations[0] + gradients + bucket + parts, parts + update, gathered, share * (width + wide))
    # The model is made whole on the host before there is anything else.
    made = elements * (FP32 + width) + (0 if plan.on_cpu else world_size * share * width)
    if plan.on_cpu:
        bounds = bounds.close(worst, on_cpu=True)
        bounds.device = max(bounds.device, made)
        return bounds
    bounds.add_transient(made)
    return bounds.close(worst, on_cpu=False)
