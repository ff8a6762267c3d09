"""Default tile sizes and ZeRO knobs, chosen from the model and the number of ranks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import TypeAdapter

from ..common.schema import validate
from ..config.model import ModelSpec
from ..config.zero import OffloadDevice, ZeroSpec
from ..costs.parameters import TABLES, parameter_groups, table_entries
from ..simulator.engine.partition import partitioned_numel

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

_ZERO: TypeAdapter[ZeroSpec] = TypeAdapter(ZeroSpec)


def choose_tile(spec: ModelSpec, world_size: int) -> int | None:
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
        if smaller * matrix % world_size == 0:
            return smaller
    return count


def choose_zero(
    spec: ModelSpec,
    tile_relations: int | None,
    stage: Literal[0, 1, 2, 3],
    world_size: int,
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
    share = partitioned_numel(groups, world_size)
    largest_share = -(-largest // world_size)
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


def override_zero(zero: ZeroSpec, zero_overrides: Mapping[str, object]) -> ZeroSpec:
    """The knobs with some set otherwise, validated anew.

    Raises:
        InputError: naming the first unknown field or bad value.
    """
    values = zero.model_dump()
    for name, value in zero_overrides.items():
        section, _, field = name.partition(".")
        if field and isinstance(values.get(section), dict):
            values[section][field] = value
        else:
            values[name] = value
    return validate(_ZERO, values, "plan", tuple(ZeroSpec.model_fields))
