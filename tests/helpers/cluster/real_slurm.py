"""A Slurm cluster on this machine: munged, slurmctld, and one slurmd for each of two nodes."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

from helpers.waiting import wait_until

CONFIG = """
ClusterName=translution
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
SchedulerType=sched/builtin
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs={cores}
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs={cores}
PartitionName=all Nodes=n[1-2] Default=YES State=UP
"""


def missing() -> str:
    """Return the programs that this machine lacks for Slurm; an empty string if it has all."""
    if os.geteuid() != 0:
        return "root"
    programs = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")
    return ", ".join(program for program in programs if shutil.which(program, path=path()) is None)


def path() -> str:
    return os.pathsep.join([os.environ["PATH"], "/usr/sbin", "/sbin"])


def free_ports(count: int) -> list[int]:
    servers = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [server.getsockname()[1] for server in servers]
    for server in servers:
        server.close()
    return ports


@contextlib.contextmanager
def real_slurm(folder: Path) -> Iterator[dict[str, str]]:
    """Start Slurm, and stop it afterwards.

    Yields:
        The environment for Slurm's commands.
    """
    folder.chmod(0o700)
    (folder / "state").mkdir()
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    names = {"folder": folder, "host": socket.gethostname().partition(".")[0], "ports": free_ports(3)}
    config = folder / "slurm.conf"
    config.write_text(CONFIG.format(cores=len(os.sched_getaffinity(0)), **names))
    environment = os.environ | {"SLURM_CONF": str(config), "PATH": path()}
    # Both nodes are this machine, where the ranks of a job meet.
    environment["MASTER_ADDR"] = "127.0.0.1"
    munged = ["munged", "--force", "--foreground", f"--key-file={key}", f"--socket={folder}/munge.socket"]
    munged += [f"--{name}={folder}/munge.{name}" for name in ("pid-file", "log-file", "seed-file")]
    commands = [munged, ["slurmctld", "-D"], ["slurmd", "-D", "-N", "n1"], ["slurmd", "-D", "-N", "n2"]]
    servers = []
    try:
        with (folder / "log").open("wb") as log:
            for command in commands:
                servers.append(
                    subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
                )
                wait_until((folder / "munge.socket").exists)
        wait_until(lambda: idle_nodes(environment) == ["idle", "2"], every_s=0.2)
        yield environment
    finally:
        for server in reversed(servers):
            server.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                server.wait(10)
            server.kill()
            server.wait()


def idle_nodes(environment: dict[str, str]) -> list[str]:
    """Return the states and numbers of the nodes."""
    command = ["sinfo", "-h", "-o", "%t %D"]
    return subprocess.run(command, env=environment, capture_output=True, text=True).stdout.split()
