"""`Plan`: a run configuration with its predicted memory and time, as ``plan.json`` stores it."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter

from ..common.errors import InputError, TranslutionError
from ..common.files import read_json
from ..common.schema import Schema, validate
from ..common.types import Line, Positive
from ..common.units import format_bytes
from ..config.model import ModelSpec
from ..config.parallel import ParallelSpec
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
TESTED_TORCH = ((2, 11), (2, 15))
"""Oldest and newest torch that runs and their predicted memory were tested with."""


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
    parallel: ParallelSpec = ParallelSpec()
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
        """Model, cluster, training, ZeRO, tile size and relation parallelism."""
        return RunConfig(self.model, self.cluster, self.training, self.zero, self.tile_relations, self.parallel)

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
        return deepspeed_config(self.training, self.zero, self.run_config.replicas)

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
_PLANNED = ("model", "cluster", "training", "zero", "tile_relations", "parallel")
_DIGEST = "digest"


class EditedPlanWarning(UserWarning):
    """A plan file has changed since it was planned, and was predicted anew; the command line prints it as a note."""


def dump_plan(plan: Plan) -> str:
    """Return the content of ``plan.json``: the plan, and a digest of what it was predicted for.

    Args:
        plan: a plan whose prediction is that of its run configuration.
    """
    document = json.loads(plan.model_dump_json())
    return json.dumps(document | {_DIGEST: _digest(document)}, indent=2, ensure_ascii=False) + "\n"


def _digest(document: Mapping[str, object]) -> str:
    """Return the SHA-256 of the fields of a plan file that the prediction follows from.

    It is taken of the file's content and not of a `Plan`, which a later version of the toolkit fills with new fields.
    """
    planned = {name: document[name] for name in _PLANNED if name in document}
    return hashlib.sha256(json.dumps(planned, sort_keys=True).encode()).hexdigest()


def version() -> str:
    """Return the installed version of the distribution."""
    return importlib.metadata.version("translution-scale")


def load_plan(folder: str | Path) -> Plan:
    """Read the plan of a plan folder or a run folder.

    A plan whose model, cluster, training, ZeRO or tile size has been edited since is predicted anew, with an
    `EditedPlanWarning`. Plans of earlier versions have no digest, by which this is noticed.

    Raises:
        InputError: if the folder holds no plan, the plan is damaged, a newer version wrote it, or what was edited
            cannot run.
        DoesNotFitError: if the edited plan needs more memory than its cluster has.
    """
    path = Path(folder) / PLAN_FILE
    try:
        text = path.read_bytes()
    except OSError:
        raise InputError(f"{folder}: is not a plan folder: must hold {PLAN_FILE}") from None
    try:
        document = read_json(text, str(path))
        digest = document.pop(_DIGEST, None) if isinstance(document, dict) else None
        found = validate(_PLAN, document, str(path), ())
    except InputError:
        if (newer := _newer_schema(text)) is not None:
            raise InputError(
                f"{path}: schema_version: {newer} is not allowed: must be {SCHEMA_VERSION}: a newer translution-scale "
                "made this plan: install that here, or plan again"
            ) from None
        raise
    return found if digest in (None, _digest(document)) else _predicted_anew(found, path)


def _predicted_anew(plan: Plan, path: Path) -> Plan:
    """Return an edited plan with a new prediction, after the checks that planning makes."""
    from .build import predict_checked

    try:
        new = predict_checked(plan.run_config)
    except TranslutionError as error:
        raise type(error)(f"{path}: was edited after it was planned: {error}") from None
    old, now = (format_bytes(each.prediction.peak_bytes) for each in (plan, new))
    warnings.warn(
        f"{path} was edited after it was planned; its memory and time are predicted anew: {now} a rank, {old} before",
        EditedPlanWarning,
        stacklevel=3,
    )
    return new.model_copy(update={"made_by": plan.made_by})


def _newer_schema(text: bytes) -> int | None:
    """Return the schema version if it is newer than this toolkit knows, else None."""
    try:
        data = read_json(text, PLAN_FILE)
    except InputError:
        return None
    found = data.get("schema_version") if isinstance(data, dict) else None
    return found if isinstance(found, int) and found > SCHEMA_VERSION else None
