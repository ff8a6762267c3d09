"""Provenance of a measured figure: the command, the date, the machine and the package versions."""

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
    """What a reader needs to reproduce a figure."""

    command: str
    time_utc: str
    machine: str
    cores: int
    versions: dict[str, str]


def processor() -> str:
    """Return the name of this machine's processor."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def make_provenance(command: str, packages: Iterable[str] = ()) -> Provenance:
    """Return the provenance of a figure that this process produces now.

    Args:
        command: the command as a user would type it.
        packages: distributions whose versions matter in addition to the toolkit's own; missing ones are skipped.
    """
    versions = {"Python": platform.python_version()}
    for name in (DISTRIBUTION, *packages):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return Provenance(command=command, time_utc=now, machine=processor(), cores=usable_cores(), versions=versions)
