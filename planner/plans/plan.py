"""A plan: a model, a cluster, how to train it there, and what that is predicted to need."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter

from ..common.errors import InputError
from ..common.schema import Schema, parse_json
from ..config.model import ModelSpec, Positive
from ..config.training import TrainingSpec
from ..config.zero import ZeroSpec
from ..deepspeed.config import deepspeed_config
from ..hardware.cluster import ClusterSpec
from ..memory.estimate import MemoryEstimate
from ..timing.step_time import StepTime

SCHEMA_VERSION: Literal[2] = 2
PLAN_FILE = "plan.json"
DEEPSPEED_VERSION, TORCH_VERSION = "0.19.8", "2.13"


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
        return deepspeed_config(self.training, self.zero, self.cluster.world_size)


_PLAN: TypeAdapter[Plan] = TypeAdapter(Plan)


def version() -> str:
    """The installed version of the distribution."""
    return importlib.metadata.version("translution-scale")


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
