"""Predicted time of an optimizer step: what each part takes, what overlaps, and what bounds it; and the cost of a run.

Compute time is the model's matrix products and elementwise work (costs/workload.py) at the cluster's rates (rates.py).
What DeepSpeed adds is in engine_time.py.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache

from ..common.schema import Schema, stored_as
from ..common.types import DTYPE_BYTES, Line
from ..config.model import ModelSpec
from ..config.model_base import fits_fused_kernels
from ..config.run_config import RunConfig
from ..config.training import TrainingSpec
from ..costs.workload import Product, Volumes, count_flops, count_work, volumes
from ..hardware.cluster import ClusterSpec
from .engine_time import PartTime, engine_parts, forward_parts, launch_seconds
from .rates import RATE_LEVELS, RateLevel, Rates
from .relation_time import exchange_seconds, exchanged, shared_gradient_seconds, zeroed_bytes

_FORWARD, _BACKWARD, _RECOMPUTE = "forward", "backward", "recomputation"
_EXCHANGE, _SHARED = "exchanges of the relation group", "shared gradients in the relation group"


class StepPart(Schema):
    """One part of a step, summed over all micro-batches."""

    name: Line
    low_s: float
    likely_s: float
    high_s: float
    bound: Line
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
    bound: Line
    """The resource whose parts have the largest sum of seconds."""
    samples_per_s: float
    """Samples per second of all ranks at the likely time."""
    model_flops: int
    """FLOPs of the step's matrix products over all ranks, without recomputation."""
    mfu: float
    """Model FLOPs utilization: `model_flops` divided by the FLOPs of all devices' peak in the likely time."""


@lru_cache(maxsize=4096)
def compute_seconds(
    spec: ModelSpec, batch: int, tiles: int, rates: Rates, relation_ranks: int = 1
) -> tuple[float, float]:
    """Return the compute seconds of forward and of backward of one micro-batch, without recomputation.

    In a relation group of G ranks, a rank multiplies the rows of G micro-batches by the matrices of R / G relations.

    Args:
        spec: the model.
        batch: samples of the micro-batch.
        tiles: tile modules called in one forward pass.
        rates: the cluster's rates.
        relation_ranks: ranks that share out the relations, G.
    """
    work = count_work(spec)
    forward = backward = 0.0
    for product in work.products:
        rows, times = (product.rows * batch, 1.0) if product.joined else (product.rows, float(batch))
        if product.grouped:
            rows, times = rows * relation_ranks, times / relation_ranks
        if product.fused:
            seconds = product.computed * rates.attention_seconds(rows, product.inner, product.cols)
            recomputed = 1 + 1 / product.backward
        else:
            seconds = _product_seconds(product, rows, spec, rates)
            recomputed = 1.0
        seconds *= times * product.copies
        forward += seconds * product.forward
        backward += seconds * product.backward * recomputed
    element_s = batch * DTYPE_BYTES[rates.precision] / rates.memory_bytes_per_s
    relations = [product for product in work.products if product.grouped]
    fused = all(_is_fused(product, spec, rates) for product in relations)
    gathered = (0, 0) if fused else work.relation_rows
    forward += (work.forward_elements + gathered[0]) * element_s
    backward += (work.backward_elements + gathered[1]) * element_s
    backward += zeroed_bytes(spec, batch, relation_ranks) / rates.memory_bytes_per_s
    overhead = launch_seconds(spec, tiles, rates, relation_ranks)
    if rates.on_cpu:
        return forward + overhead, backward + 3 * overhead
    # A GPU computes while Python launches the next operations: the slower of the two determines the time.
    return max(forward, overhead), max(backward, 3 * overhead)


def _is_fused(product: Product, spec: ModelSpec, rates: Rates) -> bool:
    fit = product.grouped and fits_fused_kernels(product.inner, product.cols, spec.heads)
    return fit and rates.has_fused_kernels


def _product_seconds(product: Product, rows: int, spec: ModelSpec, rates: Rates) -> float:
    if _is_fused(product, spec, rates):
        return rates.fused_seconds(rows, product.inner, product.cols)
    return rates.matmul_seconds(rows, product.inner, product.cols, grouped=product.grouped)


def step_parts(run: RunConfig, rates: Rates) -> dict[str, PartTime]:
    """Return every part of a step at one level of the rates.

    Args:
        run: what is trained, where and how.
        rates: the machine's rates.
    """
    v = run_volumes(run)
    return model_parts(run, v.tiles, rates) | engine_parts(run, v, rates)


def run_volumes(run: RunConfig) -> Volumes:
    """Return what a rank of a run gathers, reduces and updates."""
    threshold = run.zero.persistence_threshold_elements
    return volumes(run.model, run.tile_relations, run.replicas, threshold, run.parallel.relation)


def model_parts(run: RunConfig, tiles: int, rates: Rates) -> dict[str, PartTime]:
    """Return the parts of a step that the network computes and exchanges; ZeRO's knobs do not change them.

    Args:
        run: gives model, batch and relation parallelism.
        tiles: tile modules called in one forward pass.
        rates: the machine's rates.
    """
    model, training, group = run.model, run.training, run.parallel.relation
    forward, backward = compute_seconds(model, training.micro_batch, tiles, rates, group)
    count = training.gradient_accumulation_steps
    parts = {_FORWARD: PartTime(count * forward, "compute"), _BACKWARD: PartTime(count * backward, "compute")}
    if model.checkpointing != "none":
        parts[_RECOMPUTE] = PartTime(count * forward * count_work(model).recompute, "compute")
        if model.checkpointing == "offload" and not rates.on_cpu:
            size = model.depth * training.micro_batch * model.tokens * model.dim * training.dtype_bytes
            out, back = rates.host_copy("device_to_host"), rates.host_copy("host_to_device")
            seconds = model.depth * (out.latency_s + back.latency_s) + size / out.bytes_per_s + size / back.bytes_per_s
            parts["activations to the host and back"] = PartTime(count * seconds, "host link")
    if group > 1:
        ahead, behind = exchanged(model, group, training.micro_batch, training.dtype_bytes)
        again = count_work(model).recompute if model.checkpointing != "none" else 0.0
        seconds = (1 + again) * exchange_seconds(ahead, group, rates) + exchange_seconds(behind, group, rates)
        parts[_EXCHANGE] = PartTime(count * seconds, "network")
        shared = shared_gradient_seconds(model, group, training.dtype_bytes, rates)
        parts[_SHARED] = PartTime(count * shared, "network")
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
    training = run.training.model_copy(update={"micro_batch": batch, "gradient_accumulation_steps": 1})
    group = run.parallel.relation
    one_batch = run.replace(training=training)
    v = run_volumes(run)
    seconds = []
    for level in RATE_LEVELS:
        rates = Rates(run.cluster, training.compute_precision, level)
        forward, _ = compute_seconds(run.model, batch, v.tiles, rates, group)
        parts = {_FORWARD: PartTime(forward, "compute")} | forward_parts(one_batch, v, rates)
        if group > 1:
            sent, _ = exchanged(run.model, group, batch, training.dtype_bytes)
            parts[_EXCHANGE] = PartTime(exchange_seconds(sent, group, rates), "network")
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
