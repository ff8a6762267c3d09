"""Upper bound of a rank's memory in closed form: never below the simulated peaks, in a fraction of the time.

A search computes it for thousands of candidates and simulates only those that it would choose. Every term matches a
term of the simulated engine of the same stage; terms that peak at different times in the simulation are added here.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import ceil

from ..common.phases import Tier
from ..common.units import FP32_BYTES
from ..config.model import ModelSpec
from ..config.run_config import RunConfig
from ..config.training import LossKind
from ..costs.optimizer import SMALLEST_QUANTIZED, most_state_bytes, temporary_tensors
from ..costs.parameters import TABLES, block_weight_elements, owned_parameter_groups
from ..costs.workload import Volumes, volumes
from ..deepspeed.config import NVME_BLOCK_BYTES
from ..simulator.core import MemoryTracker, next_power_of_two
from ..simulator.engine.base import NORM_BYTES, SIMULATED_MICRO_BATCHES, EngineConfig
from ..simulator.engine.coordinator import ALIGNMENT_BYTES, ceil_div
from ..simulator.engine.stage3 import NORM_ELEMENTS
from ..simulator.network.group_share import GroupShare, largest_places
from ..simulator.network.model import MICRO_BATCHES, SimulatedNetwork, replay, sample_bytes
from ..simulator.network.ops import WEIGHT_GRADIENTS, DtypeSizes
from .bounds import BatchBound, MemoryUpperBound, WeightsBound, add_bounds
from .fsdp2_bound import bound_fsdp2

SLACK_BYTES = 2**20
"""Scalars, padding and alignment of small buffers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Terms(EngineConfig):
    """The engine configuration that is bounded, and the sizes that several terms need."""

    volumes: Volumes
    module: int
    """Elements of the largest group of parameters that is gathered together."""
    largest: int
    """Elements of the largest tensor."""

    @property
    def on_cpu(self) -> bool:
        return self.run.on_cpu

    @property
    def offloaded(self) -> bool:
        return self.zero.offload_optimizer.device != "none"

    @property
    def locks(self) -> bool:
        return self.offloaded and self.zero.offload_optimizer.pin_memory and not self.on_cpu

    @property
    def share(self) -> int:
        return self.volumes.partition_numel

    @property
    def group(self) -> int:
        """Upper bound of the elements of the largest sub-group."""
        return min(self.share, self.zero.sub_group_elements + ceil_div(self.largest, self.replicas))

    def states(self, numel: int) -> int:
        """Upper bound of the bytes of the optimizer states of a number of elements."""
        tensors = self.volumes.tensors
        flat = self.zero.stage != 0 and self.zero.sub_group_elements >= SMALLEST_QUANTIZED
        return most_state_bytes(self.training, numel, tensors, 1 if flat else tensors)

    @property
    def staying(self) -> int:
        """Elements whose optimizer states stay on the device."""
        ratio = self.zero.offload_optimizer.ratio
        if not self.offloaded:
            return self.share
        if ratio == 1:
            return 0
        # Sub-groups are about equal in size and end where tensors end.
        return min(self.share, int((1 - ratio) * self.share) + 2 * self.group)


SHALLOW, DEEP = 12, 24
"""Depths from which the activations of a deeper network are extrapolated: every further layer saves as much."""


@lru_cache(maxsize=256)
def _replayed(spec: ModelSpec, batch: int, widths: DtypeSizes, loss: LossKind, ranks: int) -> int:
    """Peak device bytes of a replayed micro-batch with whole tables."""
    peaks = []
    for share in _shares(spec, widths, ranks):
        memory = MemoryTracker(ignored=frozenset({WEIGHT_GRADIENTS, MICRO_BATCHES}))
        replay(spec, batch, widths, memory=memory, loss=loss, share=share)
        peaks += [peak.total_bytes for peak in memory.peaks.values()]
    return max(peaks)


def _shares(spec: ModelSpec, widths: DtypeSizes, ranks: int) -> tuple[GroupShare | None, ...]:
    """Return the parts of the ranks of a relation group that may hold the most."""
    if ranks == 1:
        return (None,)
    places, on_cpu = largest_places(spec.geometry, ranks), widths.device == "cpu"
    return tuple(GroupShare(spec.geometry, ranks, place, on_cpu) for place in places)


@lru_cache(maxsize=1024)
def activation_bytes(
    spec: ModelSpec, batch: int, widths: DtypeSizes, loss: LossKind = "whole", relation_ranks: int = 1
) -> tuple[int, int]:
    """Bytes of a micro-batch's activations on the device and on the host.

    A replay takes milliseconds. Its peak is not linear in the batch: scratch memory grows until it reaches its limit.
    """
    kept = spec.depth * batch * spec.tokens * spec.dim * widths.value
    away = kept if spec.checkpointing == "offload" else 0
    if spec.depth <= DEEP or len(set(spec.layer_operators)) > 1:
        return _replayed(spec, batch, widths, loss, relation_ranks), away
    shallow, deep = (
        _replayed(
            spec.model_copy(update={"depth": depth, "relative_layers": "all"}), batch, widths, loss, relation_ranks
        )
        for depth in (SHALLOW, DEEP)
    )
    # A block saves at least its input; in a shallow network the head's peak may hide it.
    each = max((deep - shallow) / (DEEP - SHALLOW), kept / spec.depth if widths.device == "cpu" or not away else 0.0)
    return deep + ceil(each * (spec.depth - DEEP)), away


@lru_cache(maxsize=256)
def _buffers(spec: ModelSpec, batch: int, widths: DtypeSizes, ranks: int) -> int:
    """Bytes of the network's buffers; on a GPU the lists of a kernel's blocks grow with the batch."""
    shares = _shares(spec, widths, ranks)
    return max(SimulatedNetwork(spec, batch, widths, share=share).buffer_bytes for share in shares)


@lru_cache(maxsize=512)
def _modules(spec: ModelSpec, tile_relations: int | None, ranks: int) -> tuple[int, int]:
    """Elements of the largest group that is gathered together, and of the largest tensor."""
    both = 2 if len({"q", "k"} & set(spec.roles)) == 2 and spec.operator != "absolute" else 1
    groups = owned_parameter_groups(spec, tile_relations, ranks)
    # A layer's bias is gathered together with its weight.
    largest = max(group.numel * both if group.component == TABLES else group.numel + group.shape[0] for group in groups)
    return largest, max(group.numel for group in groups)


def bound_memory(run: RunConfig) -> MemoryUpperBound:
    """Upper bound of the memory of one rank.

    Args:
        run: what is trained, where and how.
    """
    return add_bounds(bound_weights(run), bound_batch(run))


def bound_batch(run: RunConfig) -> BatchBound:
    """Return the part of the upper bound that ZeRO's knobs do not change.

    Args:
        run: gives model, device, training and ZeRO stage.
    """
    model, training = run.model, run.training
    sizes = DtypeSizes.of_run(run)
    samples = sample_bytes(model, training.loss_kind) * training.micro_batch
    ranks = run.parallel.relation
    on_device, on_host = activation_bytes(model, training.micro_batch, sizes, training.loss_kind, ranks)
    return BatchBound(
        on_device + samples + SLACK_BYTES,
        on_host + samples * training.gradient_accumulation_steps,
        _buffers(model, training.micro_batch, sizes, ranks),
        model.checkpointing == "block",
    )


def bound_weights(run: RunConfig) -> WeightsBound:
    """Return the part of the upper bound that neither the micro-batch nor checkpointing changes.

    Args:
        run: what is trained, where and how; of the accumulated micro-batches it only matters whether there are several.
    """
    zero = run.zero
    if zero.uses_fsdp2:
        return bound_fsdp2(run)
    ranks = run.parallel.relation
    v = volumes(run.model, run.tile_relations, run.replicas, zero.persistence_threshold_elements, ranks)
    module, largest = _modules(run.model, run.tile_relations, ranks)
    terms, bounds = _Terms(run, volumes=v, module=module, largest=largest), WeightsBound(run.on_cpu)
    if zero.stage == 0:
        _stage_0(terms, bounds)
    elif zero.stage < 3:
        _stages_1_and_2(terms, bounds)
    else:
        _parameters(terms, bounds)
        _states(terms, bounds)
        # What torch's checkpoint recomputes holds the gathered weights of the block until backward has used them.
        bounds.recomputing = block_weight_elements(run.model) * terms.width
        bounds.running, bounds.elsewhere = _running(terms), _updating(terms)
        if run.training.precision == "fp16":  # A byte for each gradient: whether it has overflowed.
            if terms.offloaded:
                bounds.add_transient(v.partition_numel)
            else:
                bounds.elsewhere = max(bounds.elsewhere, v.partition_numel)
    if ranks > 1:
        # A gradient that is averaged over the group is in two tensors.
        bounds.running += largest * terms.width
        _communicators(run, bounds)
    return bounds


def _communicators(run: RunConfig, bounds: WeightsBound) -> None:
    """Add what the communicators of relation groups hold: a search knows those of the cluster alone."""
    with_group = run.cluster.device_overhead(relation_ranks=run.parallel.relation)
    without = run.cluster.device_overhead()
    if with_group is not None and without is not None:
        bounds.device += with_group.device_bytes(0) - without.device_bytes(0)
        bounds.host += with_group.total(tier=Tier.HOST) - without.total(tier=Tier.HOST)


def _parameters(terms: _Terms, bounds: WeightsBound) -> None:
    """A rank's partition of the parameters, the persistent parameters, and the reduce bucket."""
    width, zero, share = terms.width, terms.zero, terms.share
    param, bucket = zero.offload_param, zero.reduce_bucket_elements * width
    bounds.device += terms.volumes.persistent * width + bucket
    if zero.hpz_ranks > 1:
        bounds.device += share * terms.replicas // zero.hpz_ranks * width
    if zero.overlap_comm and not terms.on_cpu:
        bounds.device += 2 * (terms.largest * width + bucket)
    if param.device == "none":
        bounds.device += share * width
        bounds.add_transient(0 if terms.on_cpu else share * width)
    elif param.device == "cpu" and terms.on_cpu:
        bounds.host += share * width
        bounds.add_transient(share * width)
    elif param.device == "cpu":
        bounds.pinned += next_power_of_two(share * width) + (2 * share * width if param.pin_memory else 0)
        bounds.add_transient(share * width)
    else:
        bounds.pinned += param.buffer_count * (param.buffer_elements * width + ALIGNMENT_BYTES)
        bounds.pinned += terms.group * terms.replicas * width + ALIGNMENT_BYTES * terms.volumes.tensors
        bounds.nvme += share * width
        bounds.host += terms.volumes.small[width == FP32_BYTES] * width


def _copied_states(terms: _Terms, numel: int) -> int:
    """What bitsandbytes copies on the host when it loads states."""
    return terms.states(numel) if terms.training.quantizes_states else 0


def _states(terms: _Terms, bounds: WeightsBound) -> None:
    """Master copy, moments, accumulated gradients and the step's gradients, on their tiers."""
    wide, share, staying, optimizer = terms.master_width, terms.share, terms.staying, terms.zero.offload_optimizer
    group = terms.group
    if not terms.offloaded:
        held = share * wide + terms.states(share)
        bounds.device += held + share * terms.accumulation_width
        bounds.add_transient(held + _copied_states(terms, share))
        bounds.add_transient(0 if terms.on_cpu else group * FP32_BYTES)
        return
    accumulated, steps = share * terms.accumulation_width, share * wide
    if optimizer.device == "nvme":
        bounds.pinned += optimizer.buffer_count * (group * FP32_BYTES + ALIGNMENT_BYTES)
        bounds.nvme += share * (wide + FP32_BYTES) + terms.states(share)
        bounds.host += accumulated
        bounds.add_transient(max(terms.states(group), group * (terms.width + wide)))
        # Tensors too small for a file stay: small gradients on the device, small sub-groups on the host.
        times = min(terms.training.gradient_accumulation_steps, SIMULATED_MICRO_BATCHES)
        bounds.device += terms.volumes.small[1] * wide * times
        swapped = terms.zero.sub_group_elements * wide >= NVME_BLOCK_BYTES
        rest = min(share, NVME_BLOCK_BYTES // wide) if swapped else share
        bounds.host += 2 * rest * wide + terms.states(rest)
        bounds.add_transient(rest * wide)
        return
    bounds.device += 2 * staying * wide + terms.states(staying)
    if terms.locks:
        bounds.pinned += next_power_of_two(accumulated) + 2 * steps
        bounds.add_transient(accumulated)
    else:
        bounds.host += accumulated + steps
    # The part that stays on the device is rounded down to whole sub-groups.
    away = share if optimizer.ratio == 1 else min(share, round(share * optimizer.ratio) + group)
    bounds.host += away * wide + terms.states(away)
    bounds.add_transient(share * wide + (terms.states(share) if optimizer.ratio < 1 else 0))
    bounds.add_transient(group * (terms.width + wide))


def _running(terms: _Terms) -> int:
    """Full modules and their gradients, and the copies that collectives make."""
    zero, replicas, module, width = terms.zero, terms.replicas, terms.module, terms.width
    ahead = reused = 0
    if zero.prefetch_bucket_elements:
        ahead = 2 * min(zero.max_live_elements + module, zero.prefetch_bucket_elements + module)
    if zero.max_reuse_distance_elements:
        reused = min(terms.volumes.gathered, zero.max_reuse_distance_elements + module)
    whole = (module + ahead + reused) * width + (2 * (module + ahead) if zero.quantized_weights else 0)
    # The two tensors of a tile of logits are gathered into one buffer and copied out of it.
    coordinator = (module + (module if terms.on_cpu else ceil_div(module, replicas))) * width
    reduced = max(zero.reduce_bucket_elements, terms.largest)
    share = ceil_div(reduced, replicas) * (terms.accumulation_width + terms.master_width)
    share += min(ceil_div(terms.largest, replicas), NORM_ELEMENTS) * NORM_BYTES if terms.offloaded else 0
    share += reduced if zero.quantized_gradients else 0
    reducing = module * width + reduced * width * (2 if terms.on_cpu else 1) + share
    return whole + max(coordinator, reducing)


def _updating(terms: _Terms) -> int:
    """The update of a sub-group, or the construction of a module, whichever is larger."""
    entirely = terms.offloaded and terms.zero.offload_optimizer.ratio == 1
    temporary = temporary_tensors(terms.training, on_cpu=terms.on_cpu, offloaded=entirely, backup=terms.offloaded)
    gradients = 0 if terms.offloaded else terms.accumulation_width + terms.master_width
    update = terms.group * (temporary * terms.master_width + gradients)
    update += ceil_div(terms.largest, terms.replicas) * NORM_BYTES
    return max(update, terms.largest * FP32_BYTES + terms.module * terms.width)


def _stage_0(terms: _Terms, bounds: WeightsBound) -> None:
    elements, width, wide = terms.volumes.elements, terms.width, terms.master_width
    master = wide if width != wide else 0
    temporary = temporary_tensors(terms.training, on_cpu=terms.on_cpu, offloaded=False, one_by_one=True)
    states = terms.states(elements)
    bounds.device += elements * (width + master) + states
    gradients = elements * width
    updating = gradients + elements * wide + temporary * terms.largest * wide if master else gradients
    loaded = elements * (width + wide) + states + _copied_states(terms, elements)
    bounds.add_transient(max(elements * (FP32_BYTES + width), loaded))
    bounds.running, bounds.elsewhere = 2 * gradients, updating + temporary * terms.largest * wide


def _stages_1_and_2(terms: _Terms, bounds: WeightsBound) -> None:
    training, replicas, largest = terms.training, terms.replicas, terms.largest
    width, wide, elements = terms.width, terms.master_width, terms.volumes.elements
    share = ceil_div(elements, 2 * replicas) * 2
    # Elements of all parameters that the rank owns at least a part of.
    own = min(elements, share + 2 * largest)
    bounds.device += replicas * share * width
    several = training.gradient_accumulation_steps > 1
    running, update = _gradients(terms, bounds, share, own)
    if terms.offloaded:
        pieces = [share * wide, share * wide, share * width, largest * width, own * width * several]
        bounds.pinned += sum(map(next_power_of_two, pieces)) if terms.locks else 0
        bounds.host += terms.states(share) + (0 if terms.locks else sum(pieces))
        bounds.device += largest * width
        bounds.add_transient(2 * share * wide)
    else:
        temporary = temporary_tensors(training, on_cpu=terms.on_cpu, offloaded=False)
        bounds.device += share * wide + terms.states(share)
        update += temporary * share * wide
        bounds.add_transient(2 * share * wide + terms.states(share) + _copied_states(terms, share))
    gathered = replicas * share * width if terms.on_cpu else 0
    bounds.running = running
    bounds.elsewhere = max(update, gathered, share * (width + wide))
    # The full model is built on the host before anything else exists.
    made = elements * (FP32_BYTES + width) + (0 if terms.on_cpu else replicas * share * width)
    if terms.on_cpu:
        bounds.least = made
    else:
        bounds.add_transient(made)


def _gradients(terms: _Terms, bounds: WeightsBound, share: int, own: int) -> tuple[int, int]:
    """Add the gradients that stages 1 and 2 keep between steps; return those of a micro-batch and of the update."""
    zero, width, wide = terms.zero, terms.width, terms.accumulation_width
    elements, largest, bucket = terms.volumes.elements, terms.largest, zero.reduce_bucket_elements
    filled = bucket * (2 if zero.overlap_comm and not terms.on_cpu else 1)
    norm = largest * NORM_BYTES if terms.offloaded else 0
    if terms.sums_all_gradients:
        flat = terms.replicas * share
        bounds.device += flat * wide
        return elements * width + largest * wide + flat * width, elements * width
    # Each rank's slice of a bucket is a tensor, and the reduction joins them again.
    produced, joined, first = 2 * largest * width, bucket * width, zero.stage == 1
    if terms.widens_gradients:
        filled *= wide if first else width
        joined += (bucket if first else 0) * wide + largest * wide
        produced += (elements if first else 0) * wide
        kept = share * wide
        widened = share * terms.master_width if wide != terms.master_width and not terms.offloaded else 0
        return produced + filled + joined + norm + kept, kept + widened + filled
    produced = elements * width if first else produced
    several = terms.training.gradient_accumulation_steps > 1
    parts = norm if terms.offloaded else own * width * (1 + several)
    update = 0 if terms.offloaded else share * (wide + terms.master_width)
    return produced + filled * width + joined + parts, parts + update
