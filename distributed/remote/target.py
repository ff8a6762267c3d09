"""The machines of a launch or a preflight."""

from __future__ import annotations

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
    node_rank: int = 0
    """With `no_ssh`: line of this node in the hostfile, from 0."""
    master_addr: str | None = None
    """Address at which all hosts reach the first one; None is its name in the hostfile."""
    master_port: int | None = None
    """Port at which the ranks meet; None is a free one, or 29500 with `no_ssh`."""
    ssh_port: int | None = None
    """Port of the hosts' ssh servers; None is ssh's default."""

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
        if self.no_ssh and not 0 <= self.node_rank < len(hosts):
            raise InputError(f"node_rank: {self.node_rank} is not allowed: must be from 0 to {len(hosts) - 1}")
        return hosts


THIS_MACHINE = LaunchTarget()
