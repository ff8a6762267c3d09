"""The card, the driver and the versions; this machine as a cluster that plans are made for."""

from __future__ import annotations

import csv
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from translution.distributed.system import own_path
from translution.planner.common import MIB, available_memory_bytes, make_provenance, usable_cores
from translution.planner.hardware import ClusterSpec, load_catalog, load_cluster, local_cpu_cluster

from .results import Result

PACKAGES = ("torch", "deepspeed", "triton", "numpy", "pydantic")
_FIELDS = (
    "name", "driver_version", "memory.total", "memory.used", "clocks.sm", "clocks.mem", "clocks.max.sm",
    "clocks.max.mem", "power.draw", "power.limit", "temperature.gpu", "pcie.link.gen.max", "pcie.link.width.max",
)  # fmt: skip
_SMI_SECONDS = 20.0


@dataclass(frozen=True)
class Context:
    """What a part is told."""

    device: str
    """"cuda" or "cpu"."""
    small: bool
    """Tiny sizes, to rehearse the check."""
    seconds: float
    """The part's time limit."""
    out: Path
    """Folder of the results."""
    result: Result

    @property
    def script(self) -> Path:
        """The script that starts parts and ranks."""
        return Path(__file__).resolve().parents[2] / "scripts" / "gpu_check.py"


def _smi(fields: tuple[str, ...]) -> dict[str, str]:
    """Return what nvidia-smi reports of the first card, by field; empty if it cannot be asked."""
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits", "--id=0"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SMI_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError):
        return {}
    rows = list(csv.reader(done.stdout.splitlines(), skipinitialspace=True))
    return dict(zip(fields, rows[0], strict=False)) if rows else {}


def card() -> dict[str, str]:
    """Return name, driver, memory in MiB, clocks in MHz, power in W and temperature of the first card.

    Settings are read and never changed.
    """
    # Drivers differ in the fields that they know, and one unknown field makes the query fail.
    return _smi(_FIELDS) or {name: value for field in _FIELDS for name, value in _smi((field,)).items()}


def device_used_bytes() -> int | None:
    """Return the bytes in use on the first card by all processes, without a context; None if unknown."""
    value = _smi(("memory.used",)).get("memory.used", "")
    return int(value) * MIB if value.isdigit() else None


def describe(command: str, device: str, *, small: bool) -> dict[str, Any]:
    """Return what the summary says about the command and the machine."""
    return {
        "schema_version": 1,
        "device": device,
        "small": small,
        "card": card() if device == "cuda" else {},
        "host_memory_bytes": available_memory_bytes(),
        "made": make_provenance(command, PACKAGES).model_dump(),
    }


def environment_of_parts(device: str) -> dict[str, str]:
    """Return the variables that the parts need in addition to this process's own."""
    # All parts compile with the same ninja: another version would compile all ops again.
    variables = {"PATH": own_path(), "PYTHONUNBUFFERED": "1"}
    if device == "cuda":
        # A compiler of another CUDA version than torch's builds the host's ops well.
        return variables | {"DS_SKIP_CUDA_CHECK": "1"}
    variables |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    return variables | {"GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME", "lo")}


def gpu_in_catalog(name: str, total_bytes: int) -> str | None:
    """Return the catalog's name of a card, such as H100 for "NVIDIA H100 80GB HBM3"; None if it is unknown.

    Args:
        name: name that the driver reports.
        total_bytes: bytes of its memory, which tell cards of one name apart.
    """
    words = name.upper().replace("-", " ").replace("RTX ", "RTX").split()
    gpus = load_catalog().gpus
    found = [key for key in gpus if key.upper().split("-")[0] in words]
    return min(found, key=lambda key: abs(gpus[key].memory_bytes.value - total_bytes), default=None)


def this_machine(device: str) -> ClusterSpec:
    """Return this machine with one rank: its card, its free host memory and its cores."""
    if device == "cpu":
        return local_cpu_cluster(1)
    found = card()
    if found.get("memory.total", "").isdigit():
        name, total = found.get("name", ""), int(found["memory.total"]) * MIB
    else:
        import torch

        properties = torch.cuda.get_device_properties(0)
        name, total = properties.name, properties.total_memory
    gpu = gpu_in_catalog(name, total)
    own: dict[str, object] = {"base": f"1x{gpu}"} if gpu else {"ranks_per_node": 1}
    own |= {"name": f"1x{gpu or name}", "device_memory_bytes": total}
    own |= {"host_memory_bytes": available_memory_bytes(), "host_cores": usable_cores()}
    return load_cluster(own)
