"""The command of a remote rank, encoded as a payload that no shell changes.

DeepSpeed's pdsh runner puts arguments with spaces in double quotes, where a shell still evaluates ``$(…)``, and
pdsh expands ``%h`` and similar sequences. Folders and variables are therefore sent as URL-safe base64.

Source: DeepSpeed 0.19.8, launcher/multinode_runner.py.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from pydantic import Field, TypeAdapter

from translution.planner.common import InputError, Schema, parse_json, read_json
from translution.planner.hardware import ClusterSpec
from translution.planner.plans import environment_variables

from ..runs.heartbeat import FOLLOW_HEARTBEAT
from ..runs.mode import CHECK_SWAP, RunMode

FORWARDED_PREFIXES = (
    "NCCL_", "GLOO_", "UCX_", "FI_", "OMP_", "MKL_", "DS_", "DEEPSPEED_", "TORCH_", "PYTORCH_", "CUDA_", "TRITON_",
    "THP_", "HF_", "WANDB_", "XDG_CACHE_HOME", "TMPDIR", "MAX_JOBS", "CC", "CXX", CHECK_SWAP,
)  # fmt: skip
"""Prefixes of the launcher's environment variables that are forwarded to ranks on other hosts."""
_PER_NODE = ("CUDA_VISIBLE_DEVICES", "DS_ENV_FILE")
"""Variables that differ between nodes; they are not forwarded."""
_EXPORTED = ("MLFLOW", "PYTHON", "MV2", "UCX", "NCCL")
"""Prefixes of the variables that DeepSpeed exports by itself, in double quotes."""
_SECRET = re.compile(r"TOKEN|KEY|SECRET|PASSW|CREDENTIAL|AUTH", re.IGNORECASE)
"""Names of variables whose values only the ranks may see."""
_SECRETS = Path("control") / "secrets.json"
PDSH_SAFE = re.compile(r"[\w@+=:,./-]+")
"""Text that pdsh and shells pass on unchanged."""


class RankCommand(Schema):
    """Everything that one rank needs to start."""

    plan_folder: Path
    """Folder with the plan."""
    run: Path
    """Run folder that the rank writes to."""
    mode: RunMode = RunMode.TRAIN
    environment: dict[str, str] = Field(default_factory=dict)
    """Environment variables, set before torch and DeepSpeed are imported."""

    def to_payload(self) -> str:
        """Encode the command as URL-safe base64 without padding."""
        return base64.urlsafe_b64encode(self.model_dump_json().encode()).decode().rstrip("=")

    @classmethod
    def from_payload(cls, payload: str) -> RankCommand:
        """Decode what `to_payload` encoded.

        Raises:
            InputError: if the payload is not an encoded command.
        """
        try:
            text = base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4))
        except (binascii.Error, ValueError):
            raise InputError(f"rank command: {payload[:40]!r} is not allowed: must be one that launch made") from None
        return parse_json(_COMMAND, text, "rank command")


_COMMAND: TypeAdapter[RankCommand] = TypeAdapter(RankCommand)


def forwarded_variables(cluster: ClusterSpec, environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return the environment variables for ranks on other hosts: the cluster's, and this process's forwarded ones."""
    own = {
        name: value
        for name, value in environment.items()
        if name.startswith(FORWARDED_PREFIXES) and name not in _PER_NODE
    }
    return environment_variables(cluster) | own


def without_secrets(variables: Mapping[str, str]) -> dict[str, str]:
    """Return the variables whose names do not look like secrets: every user of a machine sees its command lines."""
    return {name: value for name, value in variables.items() if not _SECRET.search(name)}


@contextlib.contextmanager
def hand_over_secrets(run: Path, cluster: ClusterSpec) -> Iterator[None]:
    """Let the ranks of a run on other hosts read the forwarded secrets, such as HF_TOKEN, while the block runs.

    They are in a file of the run folder that only this user can read.
    """
    known = forwarded_variables(cluster)
    secrets = {name: value for name, value in known.items() if name not in without_secrets(known)}
    path = run / _SECRETS
    path.unlink(missing_ok=True)
    if secrets:
        path.parent.mkdir(exist_ok=True)
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
            json.dump(secrets, file)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def read_secrets(run: Path) -> dict[str, str]:
    """Return what `hand_over_secrets` has written for the ranks of a run."""
    path = run / _SECRETS
    if not path.is_file():
        return {}
    secrets: dict[str, str] = read_json(path.read_bytes(), str(path))
    return secrets


def make_rank_command(
    plan_folder: Path, run: Path, cluster: ClusterSpec, mode: RunMode, *, follows: bool, check_swap: bool = False
) -> RankCommand:
    """Return the command that every rank of a run executes.

    Args:
        plan_folder: folder with the plan, visible on all hosts.
        run: run folder, visible on all hosts.
        cluster: the plan's cluster.
        mode: what the ranks do.
        follows: True if the ranks must end when the launcher's heartbeat stops.
        check_swap: True if the ranks compare what they read from NVMe with what they wrote.
    """
    environment = without_secrets(forwarded_variables(cluster)) | ({FOLLOW_HEARTBEAT: "1"} if follows else {})
    environment |= {CHECK_SWAP: "1"} if check_swap else {}
    return RankCommand(plan_folder=plan_folder.resolve(), run=run.resolve(), mode=mode, environment=environment)


def runner_environment(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return the environment of DeepSpeed's runner, without variables that it would export in double quotes.

    Python's own variables stay: only the runner can pass them on.

    Raises:
        InputError: if one of Python's variables holds characters that a shell interprets.
    """
    result = {}
    for name, value in environment.items():
        if name.startswith("PYTHON") and value and not PDSH_SAFE.fullmatch(value):
            raise InputError(f"{name}: {value[:80]!r} is not allowed: pdsh carries only letters, digits and @+=:,./-")
        if name.startswith("PYTHON") or not name.startswith(_EXPORTED):
            result[name] = value
    return result
