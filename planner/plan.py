"""A plan: a model, a cluster, how to train it there, and what that is predicted to need."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter

from .cluster import ClusterSpec
from .deepspeed_config import deepspeed_config
from .errors import DoesNotFitError, InputError
from .memory import MemoryEstimate, estimate_memory, partitioned
from .model_spec import ModelSpec, Positive, VitSpec
from .parameters import TABLES, parameter_groups, table_entries
from .schema import Schema, parse_json
from .training import TrainingSpec, ZeroSpec
from .units import format_bytes

SCHEMA_VERSION: Literal[1] = 1
PLAN_FILE = "plan.json"
TILE_ELEMENTS = 2**26
"""Largest tile that is chosen unasked: 128 MiB in bf16."""
DIGITS_TRAINING_SAMPLES = 1433
"""Of scikit-learn's 1,797 digits; the others are held out."""
SUB_GROUP_ELEMENTS = 2**24
"""Largest sub-group that the optimizer updates at once."""


class Plan(Schema):
    """Everything a run needs, and its prediction. ``schema_version`` rises when a field changes meaning."""

    schema_version: Literal[1] = SCHEMA_VERSION
    made_by: str
    """The distribution and version that made it."""
    model: ModelSpec
    cluster: ClusterSpec
    training: TrainingSpec
    zero: ZeroSpec
    tile_relations: Positive | None
    """Relations per tile of a table; null keeps tables whole."""
    prediction: MemoryEstimate

    def deepspeed_config(self) -> dict[str, Any]:
        """The content of ``ds_config.json``."""
        return deepspeed_config(self.training, self.zero, self.cluster.ranks)


_PLAN: TypeAdapter[Plan] = TypeAdapter(Plan)


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
    matrix = tables[0].numel // relations
    count = max(1, min(TILE_ELEMENTS // matrix, -(-relations // 4)))
    for smaller in range(count, count // 2, -1):
        if smaller * matrix % ranks == 0:
            return smaller
    return count


def choose_zero(spec: ModelSpec, tile_relations: int | None, stage: Literal[0, 1, 2, 3], ranks: int) -> ZeroSpec:
    """The knobs under which ZeRO-3 holds one tile at a time.

    No prefetch, no reuse distance, a bucket that takes the largest tensor: with DeepSpeed's own
    defaults every tile would stay gathered. Tensors below the smallest tile persist.
    """
    groups = parameter_groups(spec, tile_relations)
    largest = max(group.numel for group in groups)
    tiles = [group.numel for group in groups if group.component == TABLES]
    threshold = min(100_000, min(tiles) - 1) if tiles else 100_000
    share = partitioned(groups, ranks)
    # An eighth of a rank's share bounds the optimizer step's copies; above 16 Mi elements a
    # sub-group gains nothing, and below the largest tensor's share it cannot shrink.
    sub_group = max(-(-largest // ranks), min(SUB_GROUP_ELEMENTS, share // 8))
    return ZeroSpec(
        stage=stage,
        reduce_bucket_elements=largest,
        prefetch_bucket_elements=0,
        max_live_elements=4 * largest,
        max_reuse_distance_elements=0,
        persistence_threshold_elements=threshold,
        sub_group_elements=sub_group,
    )


def _check_data(spec: ModelSpec, training: TrainingSpec, ranks: int) -> None:
    if training.data != "digits":
        return
    step = training.global_batch(ranks)
    if step > DIGITS_TRAINING_SAMPLES:
        raise InputError(
            f"global batch: {step} (micro-batch x accumulation x ranks) is not allowed: must be at most "
            f"{DIGITS_TRAINING_SAMPLES}, the training samples of digits"
        )
    if not (isinstance(spec, VitSpec) and spec.classes >= 10):
        raise InputError(
            "data: 'digits' is not allowed: must be used with a vit model of at least 10 classes; use synthetic"
        )


def make_plan(
    spec: ModelSpec,
    cluster: ClusterSpec,
    training: TrainingSpec,
    *,
    stage: Literal[0, 1, 2, 3] = 3,
    tile_relations: int | None = None,
) -> Plan:
    """Choose the knobs and predict the memory of each rank.

    Args:
        spec: the model.
        cluster: where it runs.
        training: how it trains.
        stage: the ZeRO stage.
        tile_relations: relations per tile; None chooses.

    Raises:
        InputError: if the data does not suit the model, or the tile is out of range.
        DoesNotFitError: if a rank's device has less memory than predicted.
    """
    _check_data(spec, training, cluster.ranks)
    relations = table_entries(spec)
    if tile_relations is None:
        tile_relations = choose_tile(spec, cluster.ranks)
    elif not 1 <= tile_relations <= relations:
        raise InputError(f"tile_relations: {tile_relations} is not allowed: must be from 1 to {relations}")
    zero = choose_zero(spec, tile_relations, stage, cluster.ranks)
    prediction = estimate_memory(spec, cluster, training, zero, tile_relations)
    if prediction.peak_bytes > cluster.device_memory_bytes:
        raise DoesNotFitError(
            f"{spec.name} does not fit on {cluster.name} with ZeRO-{stage}: needs "
            f"{format_bytes(prediction.peak_bytes)} per rank, of which "
            f"{format_bytes(prediction.resident_bytes)} are states; a rank has "
            f"{format_bytes(cluster.device_memory_bytes)}: take more ranks, a higher stage or a smaller micro-batch"
        )
    return Plan(
        made_by=f"translution-scale {version()}",
        model=spec,
        cluster=cluster,
        training=training,
        zero=zero,
        tile_relations=tile_relations,
        prediction=prediction,
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
    return parse_json(_PLAN, text, str(path))
