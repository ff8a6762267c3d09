"""Where a figure comes from: the command, the date, the machine and the versions that gave it."""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
from collections.abc import Iterable
from pathlib import Path

from .machine import usable_cores
from .schema import Schema

DISTRIBUTION = "translution-scale"


class Provenance(Schema):
    """What a reader needs to get a figure again."""

    command: str
    time_utc: str
    machine: str
    cores: int
    versions: dict[str, str]


def processor() -> str:
    """The name of this machine's processor."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def provenance(command: str, packages: Iterable[str] = ()) -> Provenance:
    """The provenance of a figure made here and now.

    Args:
        command: as a user would type it.
        packages: distributions whose versions matter beside the toolkit's own; absent ones are left out.
    """
    versions = {"Python": platform.python_version()}
    for name in (DISTRIBUTION, *packages):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    return Provenance(command=command, time_utc=now, machine=processor(), cores=usable_cores(), versions=versions)
