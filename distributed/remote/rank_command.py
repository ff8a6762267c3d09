"""What a rank is told, as one word that every shell on its way leaves alone.

DeepSpeed's pdsh runner puts words with spaces between double quotes, in which a shell still evaluates ``$(…)``, and
pdsh replaces ``%h`` and its like. Folders and variables therefore travel as URL-safe base64.

Source: DeepSpeed 0.19.8, launcher/multinode_runner.py.
"""

from __future__ import annotations

import base64
import binascii
import os
import re
from collections.abc import Mapping
from pathlib import Path

from pydantic import Field, TypeAdapter

from translution.planner.common.errors import InputError
from translution.planner.common.schema import Schema, parse_json
from translution.planner.hardware.cluster import ClusterSpec
from translution.planner.plans.launch_scripts import environment_variables

from ..runs.heartbeat import FOLLOWS
from ..runs.mode import RunMode

FORWARDED = (
    "NCCL_", "GLOO_", "UCX_", "FI_", "OMP_", "MKL_", "DS_", "DEEPSPEED_", "TORCH_", "PYTORCH_", "CUDA_", "TRITON_",
    "HF_", "WANDB_", "XDG_CACHE_HOME", "TMPDIR", "MAX_JOBS", "CC", "CXX",
)  # fmt: skip
"""Variables of the launcher that ranks on other hosts get too, by their beginning."""
_OWN = ("CUDA_VISIBLE_DEVICES", "DS_ENV_FILE")
"""Each node has its own."""
_EXPORTED = ("MLFLOW", "PYTHON", "MV2", "UCX", "NCCL")
"""What DeepSpeed exports by itself, in double quotes."""
SAFE = re.compile(r"[\w@+=:,./-]+")


class RankCommand(Schema):
    """What one rank runs."""

    plan_folder: Path
    run: Path
    mode: RunMode = RunMode.TRAIN
    environment: dict[str, str] = Field(default_factory=dict)
    """Set before anything else is imported."""

    def encode(self) -> str:
        """The word that `decode` reads."""
        return base64.urlsafe_b64encode(self.model_dump_json().encode()).decode().rstrip("=")


_COMMAND: TypeAdapter[RankCommand] = TypeAdapter(RankCommand)


def decode(word: str) -> RankCommand:
    """The command that `RankCommand.encode` wrote.

    Raises:
        InputError: for any other word.
    """
    try:
        text = base64.urlsafe_b64decode(word + "=" * (-len(word) % 4))
    except (binascii.Error, ValueError):
        raise InputError(f"rank command: {word[:40]!r} is not allowed: must be one that launch made") from None
    return parse_json(_COMMAND, text, "rank command")


def forwarded(cluster: ClusterSpec, environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The variables that ranks on other hosts get: this process's own, and what the cluster needs beside them."""
    own = {name: value for name, value in environment.items() if name.startswith(FORWARDED) and name not in _OWN}
    return environment_variables(cluster) | own


def rank_command(plan_folder: Path, run: Path, cluster: ClusterSpec, mode: RunMode, *, follows: bool) -> RankCommand:
    """The command of every rank of a run.

    Args:
        plan_folder: what the ranks read.
        run: what they write to.
        cluster: where they run.
        mode: what the ranks do.
        follows: whether they end with the launcher's beat.
    """
    environment = forwarded(cluster) | ({FOLLOWS: "1"} if follows else {})
    return RankCommand(plan_folder=plan_folder.resolve(), run=run.resolve(), mode=mode, environment=environment)


def runner_environment(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The environment of DeepSpeed's runner: without what it would pass on in quotes that a shell reads.

    Raises:
        InputError: if Python's own variables, which only it can pass on, hold characters for a shell.
    """
    result = {}
    for name, value in environment.items():
        if name.startswith("PYTHON") and value and not SAFE.fullmatch(value):
            raise InputError(f"{name}: {value[:80]!r} is not allowed: pdsh carries only letters, digits and @+=:,./-")
        if name.startswith("PYTHON") or not name.startswith(_EXPORTED):
            result[name] = value
    return result
