"""A plan: a model, a cluster, how to train it there, and what that is predicted to need."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter

from .cluster import ClusterSpec
from .data_kinds import DIGITS, DIGITS_TRAINING_SAMPLES, check_kind
from .deepspeed_config import check_training_state, deepspeed_config
from .errors import DoesNotFitError, InputError, nearest
from .memory import MemoryEstimate, atomic_floor, estimate_memory
from .model_spec import ModelSpec, Positive, VitSpec
from .parameters import TABLES, parameter_groups, table_entries
from .schema import Schema, parse_json, validate
from .shards import partitioned
from .step_time import StepTime, estimate_step_time
from .training import OffloadDevice, TrainingSpec, ZeroSpec
from .units import format_bytes

SCHEMA_VERSION: Literal[2] = 2
PLAN_FILE = "plan.json"
DEEPSPEED_VERSION, TORCH_VERSION = "0.19.8", "2.13"
TILE_ELEMENTS = 2**26
"""Largest tile that is chosen unasked: 128 MiB in bf16."""
SUB_GROUP_ELEMENTS = 2**24
"""Largest sub-group that the optimizer updates at once."""
OFFLOAD: dict[str, tuple[OffloadDevice, OffloadDevice]] = {
    "none": ("none", "none"),
    "cpu-optimizer": ("cpu", "none"),
    "cpu": ("cpu", "cpu"),
    "nvme-optimizer": ("nvme", "none"),
    "nvme": ("nvme", "nvme"),
}
"""Where each mode keeps the optimizer's states and the parameters."""
PARAM_BUFFERS = 3
"""Buffers for parameters read from NVMe: the two of a tile of logits, and one to spare."""


class Plan(Schema):
    """Everything a run needs, and its prediction. ``schema_version`` rises when a field changes meaning."""

    schema_version: Literal[2] = SCHEMA_VERSION
    made_by: str
    """The distribution and version that made it."""
    model: ModelSpec
    cluster: ClusterSpec
    training: TrainingSpec
    zero: ZeroSpec
    tile_relations: Positive | None
    """Relations per tile of a table; null keeps tables whole."""
    prediction: MemoryEstimate
    time: StepTime | None = None
    """Predicted, where the cluster's rates are known."""
    deepspeed_version: str = DEEPSPEED_VERSION
    torch_version: str = TORCH_VERSION
    """What the knobs and the predictions were made for."""

    def deepspeed_config(self) -> dict[str, Any]:
        """The content of ``ds_config.json``."""
        return deepspeed_config(self.training, self.zero, self.cluster.ranks)


_PLAN: TypeAdapter[Plan] = TypeAdapter(Plan)
_ZERO: TypeAdapter[ZeroSpec] = TypeAdapter(ZeroSpec)


def version() -> str:
    """The installed version of the distribution."""
    return importlib.metadata.version("translution-scale")


def choose_tile(spec: ModelSpec, ranks: int) -> int | None:
    """Relations per tile: the most that keep a tile under `TILE_ELEMENTS` and cut it into equal shares.

    Small models get at least four tiles per table, so that one tile is a small part of a layer.

    Args:
        spec: the model.
        ranks: number of shares of a tile.
    """
    tables = [group for group in parameter_groups(spec) if group.component == TABLES]
    if not tables:
        return None
    relations = table_entries(spec)
    matrix = max(group.shape[1] * group.shape[2] for group in tables)
    count = max(1, min(TILE_ELEMENTS // matrix, -(-relations // 4)))
    for smaller in range(count, count // 2, -1):
        if smaller * matrix % ranks == 0:
            return smaller
    return count


def choose_zero(
    spec: ModelSpec,
    tile_relations: int | None,
    stage: Literal[0, 1, 2, 3],
    ranks: int,
    *,
    offload: str = "none",
    nvme_path: str | None = None,
    ratio: float = 1.0,
) -> ZeroSpec:
    """The knobs under which ZeRO-3 holds one tile at a time.

    No prefetch, no reuse distance, a bucket that takes the largest tensor: with DeepSpeed's own
    defaults every tile would stay gathered. Tensors below the smallest tile persist.

    Args:
        spec: the model.
        tile_relations: relations per tile; None keeps tables whole.
        stage: the ZeRO stage.
        ranks: number of shares of a tensor.
        offload: what leaves the device, and for where.
        nvme_path: a folder on every node's NVMe drive, for the modes that use it.
        ratio: share of the sub-groups whose states leave the device.

    Raises:
        InputError: if the stage does not go with the mode, or a path is missing.
    """
    groups = parameter_groups(spec, tile_relations)
    largest = max(group.numel for group in groups)
    tiles = [group.numel for group in groups if group.component == TABLES]
    threshold = min(100_000, min(tiles) - 1) if tiles else 100_000
    share = partitioned(groups, ranks)
    largest_share = -(-largest // ranks)
    # An eighth of a rank's share bounds the optimizer step's copies; above 16 Mi elements a
    # sub-group gains nothing, and below the largest tensor's share it cannot shrink.
    sub_group = max(largest_share, min(SUB_GROUP_ELEMENTS, share // 8))
    optimizer, param = OFFLOAD[offload]
    if param == "nvme":
        # DeepSpeed locks the largest sub-group's whole tensors, not a rank's shares of them.
        sub_group = largest_share
    paths = {"nvme_path": nvme_path}
    values: dict[str, Any] = {
        "stage": stage,
        "reduce_bucket_elements": largest,
        "prefetch_bucket_elements": 0,
        "max_live_elements": 4 * largest,
        "max_reuse_distance_elements": 0,
        "persistence_threshold_elements": threshold,
        "sub_group_elements": sub_group,
        "offload_optimizer": {"device": optimizer, "ratio": ratio, "pin_memory": optimizer != "nvme"}
        | (paths if optimizer == "nvme" else {}),
        "offload_param": {"device": param, "pin_memory": False, "buffer_elements": largest_share}
        | (paths | {"buffer_count": PARAM_BUFFERS} if param == "nvme" else {}),
    }
    return validate(_ZERO, values, "plan", tuple(ZeroSpec.model_fields))


def _check_augmentation(spec: ModelSpec, training: TrainingSpec) -> None:
    name, padding = training.augmentation, training.crop_padding
    if name and not isinstance(spec, VitSpec):
        off = TrainingSpec.model_fields[name].default
        raise InputError(f"{name}: {getattr(training, name)} is not allowed: must be {off} with a gpt model")
    if isinstance(spec, VitSpec) and padding >= min(spec.image):
        raise InputError(f"crop_padding: {padding} is not allowed: must be below {min(spec.image)}, the image's side")


def check_data(spec: ModelSpec, training: TrainingSpec, global_batch: int) -> None:
    """Refuse data or augmentation that does not suit the model, or more samples in a step than there are.

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


def override_zero(zero: ZeroSpec, knobs: Mapping[str, object]) -> ZeroSpec:
    """The knobs with some set otherwise, validated anew.

    Raises:
        InputError: naming the first unknown field or bad value.
    """
    values = zero.model_dump()
    for name, value in knobs.items():
        section, _, field = name.partition(".")
        if field and isinstance(values.get(section), dict):
            values[section][field] = value
        else:
            values[name] = value
    return validate(_ZERO, values, "plan", tuple(ZeroSpec.model_fields))


def _check_room(plan: Plan) -> None:
    """Refuse what a rank's device or a node's host memory has no room for."""
    spec, cluster, training, zero, prediction = plan.model, plan.cluster, plan.training, plan.zero, plan.prediction
    tile_relations = plan.tile_relations
    subject = f"{spec.name} does not fit on {cluster.name} with ZeRO-{zero.stage}"
    if prediction.peak_bytes > cluster.device_memory_bytes:
        floor = atomic_floor(spec, training, tile_relations)
        if zero.stage == 3 and tile_relations and floor > cluster.device_memory_bytes:
            smaller = tile_relations * cluster.device_memory_bytes // (2 * floor)
            advice = f"tile_relations: {max(1, smaller)}" if smaller else "a narrower model"
            raise DoesNotFitError(
                f"{subject}: a tile of {tile_relations} relations and its gradients take {format_bytes(floor)}, "
                f"whole, on every rank; a rank has {format_bytes(cluster.device_memory_bytes)}: take {advice}"
            )
        raise DoesNotFitError(
            f"{subject}: needs {format_bytes(prediction.peak_bytes)} per rank, of which "
            f"{format_bytes(prediction.resident_bytes)} are states; a rank has "
            f"{format_bytes(cluster.device_memory_bytes)}: take more ranks, offload, a higher stage or a smaller "
            "micro-batch"
        )
    host = prediction.host_bytes * cluster.ranks_per_node
    if cluster.device == "cuda" and host > cluster.host_memory_bytes:
        raise DoesNotFitError(
            f"{subject}: needs {format_bytes(host)} of host memory per node; "
            f"a node has {format_bytes(cluster.host_memory_bytes)}: take more nodes or other offload"
        )


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
    knobs: Mapping[str, object] | None = None,
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
    check_data(spec, training, training.global_batch(cluster.ranks))
    if offload not in OFFLOAD:
        allowed = ", ".join(OFFLOAD)
        raise InputError(f"offload: {offload!r} is not allowed: must be one of {allowed}{nearest(offload, OFFLOAD)}")
    relations = table_entries(spec)
    if tile_relations is None:
        tile_relations = choose_tile(spec, cluster.ranks)
    elif not 1 <= tile_relations <= relations:
        raise InputError(f"tile_relations: {tile_relations} is not allowed: must be from 1 to {relations}")
    zero = choose_zero(
        spec, tile_relations, stage, cluster.ranks, offload=offload, nvme_path=nvme_path, ratio=offload_ratio
    )
    if knobs:
        zero = override_zero(zero, knobs)
    check_training_state(training, zero, cluster.device)
    plan = finish_plan(spec, cluster, training, zero, tile_relations)
    _check_room(plan)
    return plan


def finish_plan(
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


def load_plan(folder: Path) -> Plan:
    """The plan of a plan folder or run folder.

    Raises:
        InputError: if there is none, it is damaged, or a newer version wrote it.
    """
    path = folder / PLAN_FILE
    try:
        text = path.read_bytes()
    except OSError:
        raise InputError(f"{folder}: is not a plan folder: must hold {PLAN_FILE}") from None
    try:
        return parse_json(_PLAN, text, str(path))
    except InputError:
        if (found := _newer_schema(text)) is not None:
            raise InputError(
                f"{path}: schema_version: {found} is not allowed: must be {SCHEMA_VERSION}: a newer translution-scale "
                "made this plan: install that here, or plan again"
            ) from None
        raise


def _newer_schema(text: bytes) -> int | None:
    """The version of a plan that this toolkit does not know yet; None for any other."""
    try:
        data = json.loads(text)
    except (ValueError, RecursionError):
        return None
    found = data.get("schema_version") if isinstance(data, dict) else None
    return found if isinstance(found, int) and found > SCHEMA_VERSION else None
