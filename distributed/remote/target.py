"""The machines of a launch or a preflight."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from pathlib import Path

from translution.planner.common import InputError
from translution.planner.plans import Plan

from .hostfile import read_hostfile


@dataclass(frozen=True)
class LaunchTarget:
    """Machines on which the ranks of a plan run; by default this machine."""

    hostfile: Path | None = None
    """Hostfile with one line ``HOST slots=RANKS`` per node; None is this machine."""
    no_ssh: bool = False
    """Start only the ranks of this node; the same command must be run on every other node."""
    node_rank: int | None = None
    """With `no_ssh`: line of this node in the hostfile, from 0; None is 0."""
    master_addr: str | None = None
    """Address at which all hosts reach the first one; None is its name in the hostfile."""
    master_port: int | None = None
    """Port at which the ranks meet; None is a free one, or 29500 with `no_ssh`."""
    ssh_port: int | None = None
    """Port of the hosts' ssh servers; None is ssh's default."""

    def __post_init__(self) -> None:
        """Check the ports and the address, and that nothing is given that would be ignored.

        Raises:
            InputError: naming the field, or both fields of a contradiction.
        """
        for name, port in (("master_port", self.master_port), ("ssh_port", self.ssh_port)):
            if port is not None and not 1 <= port <= _HIGHEST_PORT:
                raise InputError(f"{name}: {port} is not allowed: must be from 1 to {_HIGHEST_PORT}")
        if self.master_addr is not None and not _is_address(self.master_addr):
            raise InputError(f"master_addr: {self.master_addr!r} is not allowed: must be a host name or an IP address")
        only_with = {
            "no_ssh": (self.no_ssh or None, "hostfile", self.hostfile is not None),
            "node_rank": (self.node_rank, "no_ssh", self.no_ssh),
            "master_addr": (self.master_addr, "hostfile", self.hostfile is not None),
            "ssh_port": (self.ssh_port, "hostfile", self.hostfile is not None),
        }
        for name, (value, other, given) in only_with.items():
            if value is not None and not given:
                raise InputError(f"{name}: {value!r} is not allowed: must be used with {other}")
        if self.no_ssh and self.ssh_port is not None:
            raise InputError(f"ssh_port: {self.ssh_port} is not allowed with no_ssh, which uses no ssh")

    @property
    def over_ssh(self) -> bool:
        """True if this machine starts the ranks on other hosts."""
        return self.hostfile is not None and not self.no_ssh

    def hosts(self, plan: Plan) -> list[str]:
        """Return the hosts of the plan's nodes, in the order of the nodes; none for a launch on this machine.

        Raises:
            InputError: if the plan needs a hostfile, the hostfile cannot be read or does not match the plan, or
                `node_rank` is out of range.
        """
        if self.hostfile is None:
            if plan.cluster.nodes > 1:
                raise InputError(
                    f"hostfile: is required for a plan of {plan.cluster.nodes} nodes: --hostfile FILE, "
                    f"one line HOST slots={plan.cluster.ranks_per_node} for each"
                )
            return []
        hosts = read_hostfile(self.hostfile, plan.cluster)
        if self.no_ssh and not 0 <= (self.node_rank or 0) < len(hosts):
            raise InputError(f"node_rank: {self.node_rank} is not allowed: must be from 0 to {len(hosts) - 1}")
        return hosts


_HIGHEST_PORT = 65535
_LABEL = "[A-Za-z0-9_][A-Za-z0-9_-]{0,62}"
_HOST_NAME = re.compile(rf"(?=.{{1,253}}$)(?!(.*\.)?\d+\.?$){_LABEL}(\.{_LABEL})*\.?")


def _is_address(text: str) -> bool:
    """True for an IP address and for a host name; a name whose last part is a number can only be a mistyped address."""
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return _HOST_NAME.fullmatch(text) is not None
    return True


THIS_MACHINE = LaunchTarget()
