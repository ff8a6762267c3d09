"""Predicted time of an optimizer step: what each part takes, what overlaps, and what bounds it; and the cost of a run.

Compute time is the model's matrix products and elementwise work (costs/workload.py) at the cluster's rates (rates.py).
What ZeRO transfers and when follows DeepSpeed 0.19.8: runtime/zero/stage3.py, stage_1_and_2.py and runtime/engine.py.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from typing import Literal, NamedTuple, TypeAlias

from ..common.schema import Schema, stored_as
from ..common.types import DTYPE_BYTES
from ..config.model import ModelSpec
from ..config.run_config import RunConfig
from ..config.training import TrainingSpec
from ..config.zero import ZeroSpec
from ..costs.optimizer import state_tensors, widths
from ..costs.workload import Volumes, count_flops, count_work, volumes
from ..hardware.cluster import ClusterSpec
from .rates import RATE_LEVELS, RateLevel, Rates

Bound: TypeAlias = Literal["compute", "network", "host link", "host", "NVMe", "engine"]
_FORWARD, _BACKWARD, _RECOMPUTE = "forward", "backward", "recomputation"
_GATHER, _REDUCE = "parameter gathers", "gradient reduction"
_FROM_HOST, _TO_HOST = "parameters from the host", "gradients to the host"
_FROM_NVME, _UPDATE = "parameters from NVMe", "optimizer update"
_STATES_IN, _STATES_OUT = "optimizer states from NVMe", "optimizer states to NVMe"
_BACK, _ENGINE = "parameters to the ranks", "engine"
VISIT_OPERATIONS = 18
"""Small operations per relation and role in forward, views included; backward has three times as many. Fitted to runs
of a layer on a CPU."""
TILE_OPERATIONS = 40
"""Small operations per tile in forward on a GPU, which computes the relations of a tile together."""

_HIDDEN_SHARE = 0.9
"""Largest share of pipelined swapping that the update can hide."""


class PartTime(NamedTuple):
    """Time of one part of a step."""

    seconds: float
    bound: Bound
    """The resource that limits it."""
    overlaps: bool = False
    """Whether it overlaps with forward and backward."""
    follows: bool = False
    """Whether it begins when backward has ended, so that nothing overlaps with it."""


class StepPart(Schema):
    """One part of a step, summed over all micro-batches."""

    name: str
    low_s: float
    likely_s: float
    high_s: float
    bound: str
    """The resource that limits it."""
    overlaps: bool
    """Whether it overlaps with forward and backward."""


class StepTime(Schema):
    """Predicted time of one optimizer step."""

    breakdown: tuple[StepPart, ...] = stored_as("entries")
    """The parts in the order of the step."""
    low_s: float
    likely_s: float
    high_s: float
    bound: str
    """The resource whose parts have the largest sum of seconds."""
    samples_per_s: float
    """Samples per second of all ranks at the likely time."""
    model_flops: int
    """FLOPs of the step's matrix products over all ranks, without recomputation."""
    mfu: float
    """Model FLOPs utilization: `model_flops` divided by the FLOPs of all devices' peak in the likely time."""


@lru_cache(maxsize=4096)
def compute_seconds(spec: ModelSpec, batch: int, tiles: int, rates: Rates) -> tuple[float, float]:
    """Return the compute seconds of forward and of backward of one micro-batch, without recomputation.

    Args:
        spec: the model.
        batch: samples of the micro-batch.
        tiles: tile modules called in one forward pass.
        rates: the cluster's rates.
    """
    work = count_work(spec)
    forward = backward = 0.0
    for product in work.products:
        rows, times = (product.rows * batch, 1) if product.joined else (product.rows, batch)
        if product.fused:
            seconds = product.computed * rates.attention_seconds(rows, product.inner, product.cols)
            recomputed = 1 + 1 / product.backward
        else:
            seconds = rates.matmul_seconds(rows, product.inner, product.cols, grouped=product.grouped)
            recomputed = 1.0
        seconds *= times * product.copies
        forward += seconds * product.forward
        backward += seconds * product.backward * recomputed
    width = DTYPE_BYTES[rates.precision]
    forward += work.forward_elements * batch * width / rates.memory_bytes_per_s
    backward += work.backward_elements * batch * width / rates.memory_bytes_per_s
    calls = work.operations + (work.relation_visits * VISIT_OPERATIONS if rates.on_cpu else tiles * TILE_OPERATIONS)
    overhead = calls * rates.operation_s
    if rates.on_cpu:
        return forward + overhead, backward + 3 * overhead
    # A GPU computes while Python launches the next operations: the slower of the two determines the time.
    return max(forward, overhead), max(backward, 3 * overhead)


def _transfers(training: TrainingSpec, zero: ZeroSpec, v: Volumes, uses: int, rates: Rates) -> dict[str, PartTime]:
    """Return the collectives and copies of the micro-batches, and those of the parameters after the update."""
    width, count, parts = training.dtype_bytes, training.gradient_accumulation_steps, {}
    optimizer, param = zero.offload_optimizer.device, zero.offload_param.device
    reduce, gather = rates.collective("reduce_scatter"), rates.collective("all_gather")
    on_cpu, overlaps = rates.on_cpu, zero.overlap_comm and not rates.on_cpu
    if zero.stage == 3:
        early = overlaps and zero.prefetch_bucket_elements > 0
        parts[_GATHER] = PartTime(_gather_seconds(zero, v, width, count * uses, rates), "network", early)
        parts[_REDUCE] = PartTime(count * _reduce_seconds(zero, v, width, rates), "network", overlaps)
        parts[_BACK] = PartTime(gather.seconds(v.persistent * width), "network")
        local = v.gathered // rates.cluster.world_size * width
        if param == "cpu":
            copy = rates.host_copy("host_to_device", pinned=zero.offload_param.pin_memory)
            seconds = count * uses * (v.gathers * copy.latency_s + local / copy.bytes_per_s)
            if on_cpu:
                # Partitions are copied before they are gathered, at the rate of the gather.
                seconds = count * uses * local / gather.bytes_per_s
            parts[_FROM_HOST] = PartTime(seconds, "host link", early)
        elif param == "nvme":
            parts[_FROM_NVME] = PartTime(count * uses * local / rates.nvme_bytes_per_s("read"), "NVMe")
    else:
        times = count if zero.stage == 2 else 1
        reduce = rates.collective("all_reduce") if zero.stage == 0 else reduce
        reductions = 1 if zero.stage == 0 else max(1, -(-v.elements // zero.reduce_bucket_elements))
        seconds = reductions * reduce.latency_s + v.elements * width / reduce.bytes_per_s
        parts[_REDUCE] = PartTime(times * seconds, "network", overlaps and zero.stage > 0)
        if zero.stage and rates.cluster.world_size > 1:
            parts[_BACK] = PartTime(gather.seconds(v.elements * width), "network")
    if optimizer != "none":
        copy = rates.host_copy("device_to_host", pinned=zero.offload_optimizer.pin_memory)
        seconds = v.tensors * copy.latency_s + v.partition_numel * width / copy.bytes_per_s
        # The norm of each gradient is computed during the transfer.
        seconds = count * (seconds + rates.norm_seconds(v.partition_numel))
        parts[_TO_HOST] = PartTime(seconds, "host link", overlaps)
    return parts


def _gather_seconds(zero: ZeroSpec, v: Volumes, width: int, times: int, rates: Rates) -> float:
    """Return the seconds of a step's gathers.

    With hpZ all passes but the first gather the second copy, within a group. With qwZ they move integers of one byte,
    which are made of a partition and turned into the full tensor.
    """
    moved = 1 if zero.quantized_weights else width
    converted = v.gathered * (1 + width) / rates.memory_bytes_per_s if zero.quantized_weights else 0.0
    gather = rates.collective("all_gather")
    seconds = v.gathers * gather.latency_s + v.gathered * moved / gather.bytes_per_s
    if zero.hpz_ranks == 1:
        return times * (seconds + converted)
    near = rates.within(zero.hpz_ranks).collective("all_gather")
    return (
        times * converted + seconds + (times - 1) * (v.gathers * near.latency_s + v.gathered * moved / near.bytes_per_s)
    )


def _reduce_seconds(zero: ZeroSpec, v: Volumes, width: int, rates: Rates) -> float:
    """Return the seconds in which the gradients of a micro-batch are reduced.

    With qgZ integers of half a byte are exchanged twice, within the nodes and between them (arXiv 2306.10209, section
    3.3); DeepSpeed reduces as usual on one node.
    """
    reduce = rates.collective("reduce_scatter")
    reductions = max(1, -(-v.elements // zero.reduce_bucket_elements))
    if not zero.quantized_gradients or rates.cluster.nodes == 1:
        return reductions * reduce.latency_s + v.elements * width / reduce.bytes_per_s
    near = rates.within(rates.cluster.ranks_per_node).collective("reduce_scatter")
    exchanged = v.elements * 0.5 * (1 / near.bytes_per_s + 1 / reduce.bytes_per_s)
    converted = 2 * v.elements * (width + 0.5) / rates.memory_bytes_per_s
    return reductions * (near.latency_s + reduce.latency_s) + exchanged + converted


def _update_parts(training: TrainingSpec, zero: ZeroSpec, v: Volumes, rates: Rates) -> dict[str, PartTime]:
    """Return the optimizer's update of a rank's partition, and its transfers to and from NVMe."""
    optimizer, parts = zero.offload_optimizer, {}
    own = v.elements if zero.stage == 0 else v.partition_numel
    on_host = 0 if optimizer.device == "none" else round(own * optimizer.ratio)
    kernel = training.adam if optimizer.device == "none" else "loop"
    seconds = on_host / rates.host_adam_elements_per_s
    seconds += (own - on_host) / rates.device_adam_elements_per_s(kernel)
    if not on_host:
        seconds += rates.norm_seconds(own)
    parts[_UPDATE] = PartTime(seconds, "host" if on_host else "compute", follows=True)
    if on_host and not rates.on_cpu:
        copy = rates.host_copy("host_to_device", pinned=optimizer.pin_memory)
        back = copy.seconds(on_host * training.dtype_bytes)
        parts[_FROM_HOST + " after the update"] = PartTime(back, "host link")
    if optimizer.device == "nvme":
        master, state = widths(training)
        held = master + state * state_tensors(training)
        gradients = own * 4
        read = (own * held + gradients) / rates.nvme_bytes_per_s("read")
        # Gradients are written as the micro-batches are reduced.
        write = (own * held + gradients * training.gradient_accumulation_steps) / rates.nvme_bytes_per_s("write")
        if zero.offload_param.device == "nvme":
            write += own * training.dtype_bytes / rates.nvme_bytes_per_s("write")
        # A drive that reads and writes at the same time does each more slowly: the two add up, pipelined or not. The
        # update hides what is pipelined, except for the first read and the last write.
        pipelined = read * optimizer.pipeline_read + write * optimizer.pipeline_write
        shown = 1 - min(seconds, _HIDDEN_SHARE * pipelined) / pipelined if pipelined else 1.0
        read *= shown if optimizer.pipeline_read else 1.0
        write *= shown if optimizer.pipeline_write else 1.0
        parts[_STATES_IN], parts[_STATES_OUT] = PartTime(read, "NVMe"), PartTime(write, "NVMe")
    return parts


def _engine_part(zero: ZeroSpec, training: TrainingSpec, v: Volumes, uses: int, rates: Rates) -> PartTime:
    """Return the engine's own work in Python."""
    seconds = training.gradient_accumulation_steps * v.tensors * rates.overhead("gradient_s")
    if zero.stage == 3:
        hooks = training.gradient_accumulation_steps * uses * v.gathers * rates.overhead("module_s")
        groups = -(-v.partition_numel // zero.sub_group_elements)
        seconds += hooks + groups * rates.overhead("sub_group_s")
    else:
        seconds += rates.overhead("sub_group_s")
    return PartTime(seconds, "engine", not rates.on_cpu)


def step_parts(run: RunConfig, rates: Rates) -> dict[str, PartTime]:
    """Return every part of a step at one level of the rates.

    Args:
        run: what is trained, where and how.
        rates: the machine's rates.
    """
    model, training, zero = run.model, run.training, run.zero
    v = volumes(model, run.tile_relations, rates.cluster.world_size, zero.persistence_threshold_elements)
    forward, backward = compute_seconds(model, training.micro_batch, v.tiles, rates)
    count, recomputes = training.gradient_accumulation_steps, model.checkpointing != "none"
    parts = {_FORWARD: PartTime(count * forward, "compute"), _BACKWARD: PartTime(count * backward, "compute")}
    uses = 2
    if recomputes:
        uses = 3
        parts[_RECOMPUTE] = PartTime(count * forward * count_work(model).recompute, "compute")
        if model.checkpointing == "offload" and not rates.on_cpu:
            size = model.depth * training.micro_batch * model.tokens * model.dim * training.dtype_bytes
            out, back = rates.host_copy("device_to_host"), rates.host_copy("host_to_device")
            seconds = model.depth * (out.latency_s + back.latency_s) + size / out.bytes_per_s + size / back.bytes_per_s
            parts["activations to the host and back"] = PartTime(count * seconds, "host link")
    parts |= _transfers(training, zero, v, uses, rates)
    parts |= _update_parts(training, zero, v, rates)
    parts[_ENGINE] = _engine_part(zero, training, v, uses, rates)
    return parts


def evaluation_seconds(run: RunConfig, batch: int) -> tuple[float, float, float]:
    """Predict the seconds of one evaluation pass: low, likely and high.

    A pass is one forward pass, which gathers every parameter once.

    Args:
        run: what is trained, where and how.
        batch: samples of each rank in the pass.

    Raises:
        InputError: if the cluster lacks a rate that the prediction needs.
    """
    model, zero = run.model, run.zero
    training = run.training.model_copy(update={"micro_batch": batch, "gradient_accumulation_steps": 1})
    seconds = []
    for level in RATE_LEVELS:
        rates = Rates(run.cluster, training.compute_precision, level)
        v = volumes(model, run.tile_relations, rates.cluster.world_size, zero.persistence_threshold_elements)
        forward, _ = compute_seconds(model, batch, v.tiles, rates)
        parts = {_FORWARD: PartTime(forward, "compute")}
        transfers = _transfers(training, zero, v, 1, rates)
        parts |= {name: part for name, part in transfers.items() if name in (_GATHER, _FROM_HOST, _FROM_NVME)}
        if zero.stage == 3:
            parts[_ENGINE] = PartTime(v.gathers * rates.overhead("module_s"), "engine", not rates.on_cpu)
        seconds.append(total_seconds(parts.values()))
    low, likely, high = sorted(seconds)
    return low, likely, high


def total_seconds(parts: Iterable[PartTime]) -> float:
    """Add up parts; overlapping parts add only the time by which they exceed the compute time."""
    alone = overlapped = compute = 0.0
    for part in parts:
        if part.overlaps:
            overlapped = max(overlapped, part.seconds) if part.bound == "engine" else overlapped + part.seconds
        else:
            alone += part.seconds
            compute += part.seconds if part.bound == "compute" and not part.follows else 0.0
    return alone + max(0.0, overlapped - compute)


def estimate_step_time(run: RunConfig) -> StepTime:
    """Predict the time of one optimizer step, with an interval.

    Args:
        run: what is trained, where and how.

    Raises:
        InputError: if the cluster lacks a rate that the prediction needs.
    """
    model, cluster, training = run.model, run.cluster, run.training
    by_level: dict[RateLevel, dict[str, PartTime]] = {
        level: step_parts(run, Rates(cluster, training.compute_precision, level)) for level in RATE_LEVELS
    }
    likely = by_level["likely"]
    breakdown = tuple(
        StepPart(
            name=name,
            low_s=by_level["fast"][name].seconds,
            likely_s=part.seconds,
            high_s=by_level["slow"][name].seconds,
            bound=part.bound,
            overlaps=part.overlaps,
        )
        for name, part in likely.items()
        if part.seconds
    )
    low, middle, high = (total_seconds(by_level[level].values()) for level in ("fast", "likely", "slow"))
    bounds: dict[str, float] = {}
    for part in likely.values():
        bounds[part.bound] = bounds.get(part.bound, 0.0) + part.seconds
    batch = run.global_batch
    flops = 3 * count_flops(model).forward * batch
    peak = Rates(cluster, training.compute_precision).peak_flops_per_s * run.world_size
    return StepTime(
        breakdown=breakdown,
        low_s=low,
        likely_s=middle,
        high_s=high,
        bound=max(bounds, key=lambda name: bounds[name]),
        samples_per_s=batch / middle,
        model_flops=flops,
        mfu=flops / (middle * peak),
    )


class RunCost(Schema):
    """Cost of all steps of a run."""

    steps: int
    """Optimizer steps."""
    samples: int
    """Samples of all steps over all ranks."""
    low_s: float
    likely_s: float
    high_s: float
    """Seconds of all steps: low, likely and high prediction."""
    gpu_hours: float
    price: float | None
    """Price at the cluster's price per GPU-hour; null if the cluster has none."""


def run_cost(time: StepTime, cluster: ClusterSpec, training: TrainingSpec) -> RunCost:
    """Multiply the predicted time of one step by the number of steps.

    Args:
        time: predicted time of one step.
        cluster: gives the number of ranks and the price.
        training: gives the number of steps and the batch.
    """
    hours = time.likely_s * training.steps * cluster.world_size / 3600
    price = cluster.price_per_gpu_hour
    return RunCost(
        steps=training.steps,
        samples=training.steps * training.global_batch(cluster.world_size),
        low_s=time.low_s * training.steps,
        likely_s=time.likely_s * training.steps,
        high_s=time.high_s * training.steps,
        gpu_hours=hours,
        price=None if price is None else price * hours,
    )
