"""`Plan`: a run configuration with its predicted memory and time, as ``plan.json`` stores it."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter

from ..common.errors import InputError
from ..common.files import read_json
from ..common.schema import Schema, parse_json
from ..common.types import Line, Positive
from ..config.model import ModelSpec
from ..config.run_config import RunConfig
from ..config.training import TrainingSpec
from ..config.zero import ZeroSpec
from ..deepspeed.config import deepspeed_config
from ..hardware.cluster import ClusterSpec
from ..memory.estimate import MemoryEstimate
from ..timing.step_time import RunCost, StepTime, run_cost
from .evaluation import EvaluationPlan

SCHEMA_VERSION: Literal[2] = 2
PLAN_FILE = "plan.json"
DEEPSPEED_VERSION, TORCH_VERSION = "0.19.8", "2.13"


class Plan(Schema):
    """Everything a run needs, and its prediction. ``schema_version`` increases when a field changes its meaning."""

    schema_version: Literal[2] = SCHEMA_VERSION
    made_by: Line
    """Distribution and version that wrote the plan."""
    model: ModelSpec
    cluster: ClusterSpec
    training: TrainingSpec
    zero: ZeroSpec
    tile_relations: Positive | None
    """Relations per tile of a table; null keeps tables whole."""
    prediction: MemoryEstimate
    time: StepTime | None = None
    """Predicted time of a step; null if the cluster lacks a rate."""
    evaluation: EvaluationPlan | None = None
    """How held-out samples are evaluated; null if they are not, or in the plan of an earlier version."""
    deepspeed_version: Line = DEEPSPEED_VERSION
    torch_version: Line = TORCH_VERSION
    """Versions that the knobs and predictions were made for."""

    @property
    def run_config(self) -> RunConfig:
        """Model, cluster, training, ZeRO and tile size."""
        return RunConfig(self.model, self.cluster, self.training, self.zero, self.tile_relations)

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.cluster.world_size

    @property
    def global_batch(self) -> int:
        """Samples of one optimizer step over all ranks."""
        return self.training.global_batch(self.world_size)

    @property
    def run_cost(self) -> RunCost | None:
        """Time, GPU-hours and price of all steps; None if the time of a step is unknown."""
        return None if self.time is None else run_cost(self.time, self.cluster, self.training)

    def deepspeed_config(self) -> dict[str, Any]:
        """Return the content of ``ds_config.json``.

        Raises:
            InputError: for a plan of FSDP2.
        """
        self.require_deepspeed()
        return deepspeed_config(self.training, self.zero, self.world_size)

    def require_deepspeed(self) -> None:
        """Refuse a plan that DeepSpeed does not run.

        Raises:
            InputError: for a plan of FSDP2.
        """
        if self.zero.uses_fsdp2:
            raise InputError("engine: 'fsdp2' is not allowed: must be deepspeed; ./launch-torchrun.sh starts this plan")

    def write(self, folder: str | Path, *, force: bool = False) -> None:
        """Write the plan folder: ``plan.json``, ``ds_config.json``, launch scripts and a README.

        Args:
            folder: the folder to create.
            force: write into an existing plan folder; its runs stay as they are.

        Raises:
            InputError: if the folder exists and ``force`` is false, is no plan folder, or cannot be written.
        """
        from .folder import write_plan_folder

        write_plan_folder(self, Path(folder), force=force)


_PLAN: TypeAdapter[Plan] = TypeAdapter(Plan)


def version() -> str:
    """Return the installed version of the distribution."""
    return importlib.metadata.version("translution-scale")


def load_plan(folder: str | Path) -> Plan:
    """Read the plan of a plan folder or a run folder.

    Raises:
        InputError: if the folder holds no plan, the plan is damaged, or a newer version wrote it.
    """
    path = Path(folder) / PLAN_FILE
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
    """Return the schema version if it is newer than this toolkit knows, else None."""
    try:
        data = read_json(text, PLAN_FILE)
    except InputError:
        return None
    found = data.get("schema_version") if isinstance(data, dict) else None
    return found if isinstance(found, int) and found > SCHEMA_VERSION else None
