"""Default tile size and ZeRO knobs for a model, a number of ranks and an offload mode."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import TypeAdapter

from ..common.errors import InputError
from ..common.schema import validate
from ..config.model import ModelSpec
from ..config.zero import OffloadMode, ZeroSpec
from ..costs.parameters import TABLES, owned_parameter_groups, parameter_groups, table_entries
from ..hardware.cluster import ClusterSpec
from ..simulator.engine.coordinator import partitioned_numel

TILE_ELEMENTS = 2**26
"""Elements of the largest default tile: 128 MiB in bf16."""

SUB_GROUP_ELEMENTS = 2**24
"""Elements of the largest default sub-group, which the optimizer updates at once."""

PARAM_BUFFERS = 3
"""Default number of buffers for parameters read from NVMe: two for a tile of logits, and one spare."""

_ZERO: TypeAdapter[ZeroSpec] = TypeAdapter(ZeroSpec)


def choose_tile(spec: ModelSpec, world_size: int, relation_ranks: int = 1) -> int | None:
    """Return the default relations per tile: the largest tile up to `TILE_ELEMENTS` that divides evenly among ranks.

    A table gets at least four tiles, so that one tile is a small part of a layer. A rank of a relation group has only a
    part of each table, which may be one tile.

    Args:
        spec: the model.
        world_size: number of ranks.
        relation_ranks: ranks that share out the relations, G; ZeRO then partitions over ``world_size`` / G ranks.
    """
    tables = [group for group in parameter_groups(spec) if group.component == TABLES]
    if not tables:
        return None
    relations, replicas = -(-table_entries(spec) // relation_ranks), world_size // relation_ranks
    matrix = max(group.shape[1] * group.shape[2] for group in tables)
    most = relations if relation_ranks > 1 else -(-relations // 4)
    count = max(1, min(TILE_ELEMENTS // matrix, most))
    for smaller in range(count, count // 2, -1):
        if smaller * matrix % replicas == 0:
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
    relation_ranks: int = 1,
) -> ZeroSpec:
    """Return default knobs with which ZeRO-3 gathers one tile at a time.

    There is no prefetch and no reuse distance, and the bucket has the size of the largest tensor: with DeepSpeed's own
    defaults every tile would stay gathered. Tensors smaller than the smallest tile are persistent.

    Args:
        spec: the model.
        tile_relations: relations per tile; None keeps tables whole.
        stage: the ZeRO stage.
        world_size: number of ranks.
        offload: offload mode, one of `OffloadMode`.
        nvme_path: a folder on every node's NVMe drive, for the nvme modes.
        ratio: fraction of the sub-groups whose states are offloaded.
        relation_ranks: ranks that share out the relations, G; ZeRO then partitions over ``world_size`` / G ranks.

    Raises:
        InputError: if the stage does not support the mode, or the path is missing.
    """
    groups = owned_parameter_groups(spec, tile_relations, relation_ranks)
    replicas, largest = world_size // relation_ranks, max(group.numel for group in groups)
    tiles = [group.numel for group in groups if group.component == TABLES]
    threshold = min(100_000, min(tiles) - 1) if tiles else 100_000
    share = partitioned_numel(groups, replicas)
    largest_share = -(-largest // replicas)
    # An eighth of a rank's share bounds the optimizer step's copies; above 16 Mi elements a
    # sub-group gains nothing, and below the largest tensor's share it cannot shrink.
    sub_group = max(largest_share, min(SUB_GROUP_ELEMENTS, share // 8))
    mode = OffloadMode.parse(offload)
    optimizer, param = mode.optimizer_device, mode.param_device
    if param == "nvme":
        # DeepSpeed pins the full tensors of the largest sub-group, not a rank's partitions of them.
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


def choose_fsdp2(spec: ModelSpec, tile_relations: int | None, cluster: ClusterSpec) -> ZeroSpec:
    """Return the default knobs of FSDP2: one tile at a time is gathered, without prefetch.

    Args:
        spec: the model.
        tile_relations: relations per tile; None keeps tables whole.
        cluster: the ranks; on GPUs collectives have streams of their own.
    """
    base = choose_zero(spec, tile_relations, 3, cluster.world_size)
    changes = {"engine": "fsdp2", "persistence_threshold_elements": 0, "overlap_comm": cluster.device == "cuda"}
    return base.model_copy(update=changes)


def whole_rows(tile_relations: int, world_size: int) -> int:
    """Return the largest tile up to a size that FSDP2 splits evenly; or the size if it is below the ranks.

    Args:
        tile_relations: relations per tile.
        world_size: number of ranks.
    """
    return tile_relations // world_size * world_size or tile_relations


def require_plain(stage: int | None, offload: str | None, zero_overrides: Mapping[str, object] | None) -> None:
    """Refuse what FSDP2 does not have.

    Args:
        stage: the ZeRO stage, None if it is not given.
        offload: the offload mode, None if it is not given.
        zero_overrides: fields of `ZeroSpec` that are given.

    Raises:
        InputError: for a stage below 3, an offload mode, or a knob.
    """
    given: list[tuple[str, object, object]] = [("stage", stage, 3), ("offload", offload, "none")]
    given += [(f"zero {name}", value, None) for name, value in (zero_overrides or {}).items()]
    for name, value, allowed in given:
        if value not in (None, allowed):
            rest = "left out" if allowed is None else str(allowed)
            raise InputError(f"{name}: {value!r} is not allowed: must be {rest} with engine fsdp2")


def override_zero(zero: ZeroSpec, zero_overrides: Mapping[str, object]) -> ZeroSpec:
    """Return validated knobs with some fields replaced; a field of an offload section has a dotted name.

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
