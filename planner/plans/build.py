"""Build a plan without a search: choose default knobs, check the combination, predict memory and time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from ..common.errors import InputError, nearest
from ..config.model import ModelSpec
from ..config.training import TrainingSpec
from ..costs.parameters import table_entries
from ..deepspeed.config import check_training_state
from ..hardware.cluster import ClusterSpec
from ..memory.estimate import estimate_memory
from ..run_config import RunConfig
from ..timing.step_time import estimate_step_time
from .defaults import OFFLOAD, choose_tile, choose_zero, override_zero
from .plan import Plan, version
from .validation import check_capacity, check_data


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
) -> Plan:
    """Build a plan with a given ZeRO stage and offload mode and default knobs.

    Args:
        spec: the model.
        cluster: the cluster it runs on.
        training: how it trains.
        stage: the ZeRO stage.
        tile_relations: relations per tile; None chooses a size.
        offload: offload mode, one of `OFFLOAD`.
        nvme_path: a folder on every node's NVMe drive, for the nvme modes.
        offload_ratio: fraction of the optimizer's sub-groups that are offloaded.
        zero_overrides: fields of `ZeroSpec` that replace the default knobs; a field of an offload section is written
            ``offload_optimizer.buffer_count``.

    Raises:
        InputError: if the data does not suit the model, the tile size is out of range, or DeepSpeed does not support
            the combination of optimizer, dtypes and offload.
        DoesNotFitError: if the prediction exceeds the memory of a rank's device or of a node's host.
    """
    check_data(spec, training, training.global_batch(cluster.world_size))
    if offload not in OFFLOAD:
        allowed = ", ".join(OFFLOAD)
        raise InputError(f"offload: {offload!r} is not allowed: must be one of {allowed}{nearest(offload, OFFLOAD)}")
    relations = table_entries(spec)
    if tile_relations is None:
        tile_relations = choose_tile(spec, cluster.world_size)
    elif not 1 <= tile_relations <= relations:
        raise InputError(f"tile_relations: {tile_relations} is not allowed: must be from 1 to {relations}")
    zero = choose_zero(
        spec, tile_relations, stage, cluster.world_size, offload=offload, nvme_path=nvme_path, ratio=offload_ratio
    )
    if zero_overrides:
        zero = override_zero(zero, zero_overrides)
    check_training_state(training, zero, cluster.device)
    plan = predict_plan(RunConfig(spec, cluster, training, zero, tile_relations))
    check_capacity(plan)
    return plan


def predict_plan(run: RunConfig) -> Plan:
    """Return the plan of a complete run configuration, with its predicted memory and time.

    The time is None if the cluster lacks a rate.
    """
    try:
        time = estimate_step_time(run)
    except InputError:
        time = None
    return Plan(
        made_by=f"translution-scale {version()}",
        model=run.model,
        cluster=run.cluster,
        training=run.training,
        zero=run.zero,
        tile_relations=run.tile_relations,
        prediction=estimate_memory(run),
        time=time,
    )
