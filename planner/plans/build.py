"""Build a plan without a search: choose default knobs, check the data and the memory, predict memory and time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from ..common.errors import DoesNotFitError, InputError
from ..common.units import format_bytes
from ..config.datasets import DIGITS, DIGITS_TRAINING_SAMPLES, check_kind
from ..config.model import ModelSpec, VitSpec
from ..config.parallel import ParallelSpec
from ..config.run_config import RunConfig
from ..config.training import TrainingSpec
from ..config.zero import OffloadMode, ShardingEngine, ZeroSpec
from ..costs.parameters import table_entries
from ..deepspeed.config import check_training_state
from ..hardware.cluster import ClusterSpec
from ..memory.estimate import estimate_memory, gathered_floor_bytes
from ..timing.step_time import estimate_step_time
from .defaults import choose_fsdp2, choose_tile, choose_zero, override_zero, require_plain, whole_rows
from .evaluation import plan_evaluation, with_evaluation
from .plan import Plan, version


def make_plan(
    spec: ModelSpec,
    cluster: ClusterSpec,
    training: TrainingSpec,
    *,
    stage: Literal[0, 1, 2, 3] = 3,
    tile_relations: int | None = None,
    offload: str = "none",
    nvme_path: str | None = None,
    offload_ratio: float = 1.0,
    zero_overrides: Mapping[str, object] | None = None,
    engine: ShardingEngine = "deepspeed",
    relation_parallel: int = 1,
) -> Plan:
    """Build a plan with a given ZeRO stage and offload mode and default knobs.

    Args:
        spec: the model.
        cluster: the cluster it runs on.
        training: how it trains.
        stage: the ZeRO stage.
        tile_relations: relations per tile; None chooses a size.
        offload: offload mode, one of `OffloadMode`.
        nvme_path: a folder on every node's NVMe drive, for the nvme modes.
        offload_ratio: fraction of the optimizer's sub-groups that are offloaded.
        zero_overrides: fields of `ZeroSpec` that replace the default knobs; a field of an offload section is written
            ``offload_optimizer.buffer_count``.
        engine: what shards; ``"fsdp2"`` has no stage below 3, no offload and none of the knobs.
        relation_parallel: ranks that share out the relations of every table; ZeRO partitions over the replicas.

    Raises:
        InputError: if the data does not suit the model, the tile size is out of range, the model or the cluster does
            not suit relation parallelism, or DeepSpeed does not support the combination of optimizer, dtypes and
            offload.
        DoesNotFitError: if the prediction exceeds the memory of a rank's device or of a node's host.
    """
    check_data(spec, training, training.global_batch(cluster.world_size))
    OffloadMode.parse(offload)
    if relation_parallel < 1:
        raise InputError(f"relation_parallel: {relation_parallel} is not allowed: must be at least 1")
    parallel = ParallelSpec(relation=relation_parallel)
    # Checks the group before tiles and knobs are chosen for it.
    RunConfig(spec, cluster, training, ZeroSpec(), parallel=parallel)
    if tile_relations is None:
        tile_relations = choose_tile(spec, cluster.world_size, relation_parallel)
        if tile_relations and engine == "fsdp2":
            tile_relations = whole_rows(tile_relations, cluster.world_size)
    else:
        _check_tile(spec, tile_relations, cluster.world_size)
    zero = choose_zero(
        spec,
        tile_relations,
        stage,
        cluster.world_size,
        offload=offload,
        nvme_path=nvme_path,
        ratio=offload_ratio,
        relation_ranks=relation_parallel,
    )
    if engine == "fsdp2":
        require_plain(stage, offload, zero_overrides)
        zero = choose_fsdp2(spec, tile_relations, cluster)
    if zero_overrides:
        zero = override_zero(zero, zero_overrides)
    return predict_checked(RunConfig(spec, cluster, training, zero, tile_relations, parallel))


def predict_checked(run: RunConfig) -> Plan:
    """Return the plan of a complete run configuration that can run, with its predicted memory and time.

    Args:
        run: the configuration.

    Raises:
        InputError: if the data does not suit the model, the tile size is out of range, or DeepSpeed does not support
            the combination of optimizer, dtypes and offload.
        DoesNotFitError: if the prediction exceeds the memory of a rank's device or of a node's host.
    """
    check_data(run.model, run.training, run.global_batch)
    if run.tile_relations is not None:
        _check_tile(run.model, run.tile_relations, run.world_size)
    check_training_state(run.training, run.zero, run.cluster.device)
    plan = predict_plan(run)
    check_capacity(plan)
    return plan


def _check_tile(spec: ModelSpec, tile_relations: int, world_size: int) -> None:
    if choose_tile(spec, world_size) is None:
        raise InputError(f"tile_relations: {tile_relations} is not allowed: the model has no tables")
    relations = table_entries(spec)
    if not 1 <= tile_relations <= relations:
        raise InputError(f"tile_relations: {tile_relations} is not allowed: must be from 1 to {relations}")


def predict_plan(run: RunConfig) -> Plan:
    """Return the plan of a complete run configuration, with its predicted memory and time.

    The time is None if the cluster lacks a rate.
    """
    try:
        time = estimate_step_time(run)
    except InputError:
        time = None
    prediction = estimate_memory(run)
    evaluation = plan_evaluation(run, prediction, time)
    return Plan(
        made_by=f"translution-scale {version()}",
        model=run.model,
        cluster=run.cluster,
        training=run.training,
        zero=run.zero,
        tile_relations=run.tile_relations,
        parallel=run.parallel,
        prediction=with_evaluation(run, prediction, evaluation),
        time=time,
        evaluation=evaluation,
    )


def _check_augmentation(spec: ModelSpec, training: TrainingSpec) -> None:
    name, padding = training.augmentation, training.crop_padding
    if name and not isinstance(spec, VitSpec):
        off = TrainingSpec.model_fields[name].default
        raise InputError(f"{name}: {getattr(training, name)} is not allowed: must be {off} with a {spec.family} model")
    if isinstance(spec, VitSpec) and padding >= min(spec.image):
        raise InputError(f"crop_padding: {padding} is not allowed: must be below {min(spec.image)}, the image's side")


def check_data(spec: ModelSpec, training: TrainingSpec, global_batch: int) -> None:
    """Check that data and augmentation suit the model, and that the data set has enough samples for a step.

    Args:
        spec: the model.
        training: names the data and the augmentation.
        global_batch: samples of one optimizer step over all ranks.

    Raises:
        InputError: naming the field.
    """
    _check_augmentation(spec, training)
    if training.data in DIGITS and global_batch > DIGITS_TRAINING_SAMPLES:
        raise InputError(
            f"global batch: {global_batch} (micro-batch x accumulation x ranks) is not allowed: must be at most "
            f"{DIGITS_TRAINING_SAMPLES}, the training samples of digits"
        )
    check_kind(spec, training.data, training.digit_pixels)
    if training.evaluation_data is not None:
        check_kind(spec, training.evaluation_data, training.digit_pixels, "evaluation_data")


def check_capacity(plan: Plan) -> None:
    """Check that the predicted memory fits the cluster.

    Raises:
        DoesNotFitError: if it exceeds the memory of a rank's device or of a node's host.
    """
    cluster, zero, prediction, tile_relations = plan.cluster, plan.zero, plan.prediction, plan.tile_relations
    subject = f"{plan.model.name} does not fit on {cluster.name} with ZeRO-{zero.stage}"
    if prediction.peak_bytes > cluster.device_memory_bytes:
        floor = gathered_floor_bytes(plan.model, plan.training, tile_relations, plan.parallel.relation)
        if zero.stage == 3 and tile_relations and floor > cluster.device_memory_bytes:
            smaller = tile_relations * cluster.device_memory_bytes // (2 * floor)
            advice = f"tile_relations: {max(1, smaller)}" if smaller else "a narrower model"
            raise DoesNotFitError(
                f"{subject}: every rank gathers a full tile of {tile_relations} relations, with its gradients "
                f"{format_bytes(floor)}; a rank has {format_bytes(cluster.device_memory_bytes)}: use {advice}"
            )
        raise DoesNotFitError(
            f"{subject}: needs {format_bytes(prediction.peak_bytes)} per rank, of which "
            f"{format_bytes(prediction.resident_bytes)} are states; a rank has "
            f"{format_bytes(cluster.device_memory_bytes)}: use more ranks, offload, a higher stage or a smaller "
            "micro-batch"
        )
    host = prediction.host_bytes * cluster.ranks_per_node
    if cluster.device == "cuda" and host > cluster.host_memory_bytes:
        raise DoesNotFitError(
            f"{subject}: needs {format_bytes(host)} of host memory per node; "
            f"a node has {format_bytes(cluster.host_memory_bytes)}: use more nodes or another offload mode"
        )
