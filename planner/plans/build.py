"""Build a plan without a search: choose the knobs, check it, predict its memory and time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from ..common.errors import InputError, nearest
from ..config.model import ModelSpec
from ..config.training import TrainingSpec
from ..config.zero import ZeroSpec
from ..costs.parameters import table_entries
from ..deepspeed.config import check_training_state
from ..hardware.cluster import ClusterSpec
from ..memory.estimate import estimate_memory
from ..timing.step_time import estimate_step_time
from .defaults import OFFLOAD, choose_tile, choose_zero, override_zero
from .plan import Plan, version
from .validation import _check_room, check_data


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
    """Choose the knobs and predict the memory of each rank.

    Args:
        spec: the model.
        cluster: where it runs.
        training: how it trains.
        stage: the ZeRO stage.
        tile_relations: relations per tile; None chooses.
        offload: what leaves the device, and for where.
        nvme_path: a folder on every node's NVMe drive.
        offload_ratio: share of the optimizer's sub-groups that leave the device.
        knobs: fields of `ZeroSpec` to set otherwise than chosen; those of its offloads as
            ``offload_optimizer.buffer_count``.

    Raises:
        InputError: if the data does not suit the model, the tile is out of range, or DeepSpeed
            does not run the combination of optimizer, dtypes and offload.
        DoesNotFitError: if a rank's device or a node's host has less memory than predicted.
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
    plan = complete_plan(spec, cluster, training, zero, tile_relations)
    _check_room(plan)
    return plan


def complete_plan(
    spec: ModelSpec, cluster: ClusterSpec, training: TrainingSpec, zero: ZeroSpec, tile_relations: int | None
) -> Plan:
    """A plan whose knobs are all chosen, with what it is predicted to need.

    Args:
        spec: the model.
        cluster: where it runs.
        training: how it trains.
        zero: the stage, its knobs and offload.
        tile_relations: relations per tile; None keeps tables whole.
    """
    try:
        time = estimate_step_time(spec, cluster, training, zero, tile_relations)
    except InputError:
        # A cluster whose rates nobody gave.
        time = None
    return Plan(
        made_by=f"translution-scale {version()}",
        model=spec,
        cluster=cluster,
        training=training,
        zero=zero,
        tile_relations=tile_relations,
        prediction=estimate_memory(spec, cluster, training, zero, tile_relations),
        time=time,
    )
