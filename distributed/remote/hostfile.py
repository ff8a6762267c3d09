"""Read hostfiles in DeepSpeed's format."""

from __future__ import annotations

import re
from pathlib import Path

from translution.planner.common import InputError
from translution.planner.hardware import ClusterSpec

_HOST = re.compile(r"[A-Za-z0-9_][A-Za-z0-9@._-]*")

_LINE = re.compile(r"(\S+)\s+slots=(\d+)")


def read_hostfile(path: Path, cluster: ClusterSpec) -> list[str]:
    """Return the hosts of a hostfile with one line ``HOST slots=RANKS`` per node; the first host is node 0.

    Args:
        path: the hostfile.
        cluster: the plan's cluster, which the hostfile must match.

    Raises:
        InputError: if the file cannot be read, has an invalid line, or does not match the plan's nodes and ranks.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"hostfile: {path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    hosts: list[str] = []
    for number, line in enumerate(lines, start=1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        match = _LINE.fullmatch(text)
        # Host names pass through a shell on their way to ssh.
        if match is None or not _HOST.fullmatch(match[1]):
            raise InputError(f"hostfile: {path}:{number}: {text[:80]!r} is not allowed: must be HOST slots=RANKS")
        if match[1] in hosts:
            raise InputError(f"hostfile: {path}:{number}: {match[1]} is not allowed: must be listed only once")
        if int(match[2]) != cluster.ranks_per_node:
            raise InputError(
                f"hostfile: {path}:{number}: slots={match[2]} is not allowed: "
                f"must be {cluster.ranks_per_node}, the plan's ranks per node"
            )
        hosts.append(match[1])
    if len(hosts) != cluster.nodes:
        raise InputError(
            f"hostfile: {path}: {len(hosts)} hosts are not allowed: must be {cluster.nodes}, the plan's nodes"
        )
    return hosts
