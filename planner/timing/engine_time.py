"""What DeepSpeed adds to the time of a step: collectives, copies between tiers, the update, and its own work in Python.

What ZeRO transfers and when follows DeepSpeed 0.19.8: runtime/zero/stage3.py, stage_1_and_2.py and runtime/engine.py.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, TypeAlias

from ..config.model import ModelSpec
from ..config.run_config import RunConfig
from ..config.training import TrainingSpec
from ..config.zero import ZeroSpec
from ..costs.optimizer import state_tensors, widths
from ..costs.workload import Volumes, count_work
from .rates import Rates
from .relation_time import replica_rates

Bound: TypeAlias = Literal["compute", "network", "host link", "host", "NVMe", "engine"]
GATHER, FROM_HOST, FROM_NVME = "parameter gathers", "parameters from the host", "parameters from NVMe"
_REDUCE, _TO_HOST, _UPDATE = "gradient reduction", "gradients to the host", "optimizer update"
_STATES_IN, _STATES_OUT = "optimizer states from NVMe", "optimizer states to NVMe"
_BACK, _ENGINE = "parameters to the ranks", "engine"
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


VISIT_OPERATIONS = 18
"""Small operations per relation and role in forward, views included; backward has three times as many. Fitted to runs
of a layer on a CPU."""
TILE_OPERATIONS = 40
"""Small operations per tile in forward on a GPU, which computes the relations of a tile together."""


def launch_seconds(model: ModelSpec, tiles: int, rates: Rates, relation_ranks: int = 1) -> float:
    """Return the seconds in which Python calls the operations of one forward pass; backward takes three times as long.

    Args:
        model: the model.
        tiles: tile modules called in the pass.
        rates: the machine's rates.
        relation_ranks: ranks that share out the relations, G.
    """
    work = count_work(model)
    visits = work.relation_visits / relation_ranks * VISIT_OPERATIONS if rates.on_cpu else tiles * TILE_OPERATIONS
    return (work.operations + visits) * rates.operation_s


def weight_uses(model: ModelSpec) -> int:
    """Return how often a micro-batch uses each weight: recomputation is one more use."""
    return 2 if model.checkpointing == "none" else 3


def engine_parts(run: RunConfig, v: Volumes, rates: Rates) -> dict[str, PartTime]:
    """Return the parts of a step that DeepSpeed adds; they depend neither on the micro-batch nor on what it computes.

    Args:
        run: what is trained, where and how.
        v: its `Volumes`.
        rates: the machine's rates.
    """
    training, zero, uses, group = run.training, run.zero, weight_uses(run.model), run.parallel.relation
    parts = _transfers(run, v, uses, rates)
    parts |= _update_parts(training, zero, v, rates)
    engine = _engine_part(zero, training, v, uses, rates)
    if not rates.on_cpu:
        # The thread that runs the engine launches the kernels too, and again those that are recomputed.
        passes = 4 + (count_work(run.model).recompute if uses > 2 else 0.0)
        launches = training.gradient_accumulation_steps * passes * launch_seconds(run.model, v.tiles, rates, group)
        engine = engine._replace(seconds=engine.seconds + launches)
    parts[_ENGINE] = engine
    return parts


def _transfers(run: RunConfig, v: Volumes, uses: int, rates: Rates) -> dict[str, PartTime]:
    """Return the collectives and copies of the micro-batches, and those of the parameters after the update.

    All collectives are those of ZeRO, among replicas.
    """
    training, zero, among = run.training, run.zero, replica_rates(rates, run.parallel.relation)
    width, count, parts = training.dtype_bytes, training.gradient_accumulation_steps, {}
    optimizer, param = zero.offload_optimizer.device, zero.offload_param.device
    reduce, gather = among.collective("reduce_scatter"), among.collective("all_gather")
    on_cpu, overlaps = rates.on_cpu, zero.overlap_comm and not rates.on_cpu
    if zero.stage == 3:
        early = overlaps and zero.prefetch_bucket_elements > 0
        parts[GATHER] = PartTime(_gather_seconds(zero, v, width, count * uses, among), "network", early)
        parts[_REDUCE] = PartTime(count * _reduce_seconds(zero, v, width, among), "network", overlaps)
        parts[_BACK] = PartTime(gather.seconds(v.persistent * width), "network")
        local = v.gathered // run.replicas * width
        if param == "cpu":
            copy = rates.host_copy("host_to_device", pinned=zero.offload_param.pin_memory)
            seconds = count * uses * (v.gathers * copy.latency_s + local / copy.bytes_per_s)
            if on_cpu:
                # Partitions are copied before they are gathered, at the rate of the gather.
                seconds = count * uses * local / gather.bytes_per_s
            parts[FROM_HOST] = PartTime(seconds, "host link", early)
        elif param == "nvme":
            parts[FROM_NVME] = PartTime(count * uses * local / rates.nvme_bytes_per_s("read"), "NVMe")
    else:
        times = count if zero.stage == 2 else 1
        reduce = among.collective("all_reduce") if zero.stage == 0 else reduce
        reductions = 1 if zero.stage == 0 else max(1, -(-v.elements // zero.reduce_bucket_elements))
        seconds = reductions * reduce.latency_s + v.elements * width / reduce.bytes_per_s
        parts[_REDUCE] = PartTime(times * seconds, "network", overlaps and zero.stage > 0)
        if zero.stage and run.replicas > 1:
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
        parts[FROM_HOST + " after the update"] = PartTime(back, "host link")
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


def forward_parts(run: RunConfig, v: Volumes, rates: Rates) -> dict[str, PartTime]:
    """Return what DeepSpeed adds to one forward pass without training.

    Args:
        run: what is evaluated, where and how; one micro-batch.
        v: its `Volumes`.
        rates: the machine's rates.
    """
    transfers = _transfers(run, v, 1, rates)
    parts = {name: part for name, part in transfers.items() if name in (GATHER, FROM_HOST, FROM_NVME)}
    if run.zero.stage == 3:
        launches = 0.0 if rates.on_cpu else launch_seconds(run.model, v.tiles, rates, run.parallel.relation)
        parts[_ENGINE] = PartTime(v.gathers * rates.overhead("module_s") + launches, "engine", not rates.on_cpu)
    return parts
