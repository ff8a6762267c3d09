"""Two hosts on one machine: network namespaces, each with its own address and ssh server."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from helpers.waiting import wait_until

SSH_PORT = 2222
ADDRESSES = ("10.213.77.1", "10.213.77.2")


@dataclass(frozen=True)
class Hosts:
    """The two hosts."""

    names: tuple[str, str]
    folder: Path
    hostfile: Path
    environment: dict[str, str]

    def command(self, *words: object, host: int = 0) -> list[str]:
        """Return a command that runs `words` on one of the hosts."""
        return ["ip", "netns", "exec", self.names[host], *map(str, words)]


def missing() -> str:
    """Return the programs that this machine lacks for two hosts; an empty string if it has all."""
    if os.geteuid() != 0:
        return "root"
    programs = ("ip", "ssh", "ssh-keygen", "pdsh", "/usr/sbin/sshd")
    return ", ".join(program for program in programs if shutil.which(program) is None)


def run(*words: object) -> None:
    subprocess.run([*map(str, words)], check=True, capture_output=True)


@contextlib.contextmanager
def real_hosts(folder: Path) -> Iterator[Hosts]:
    """Create the hosts, and remove them afterwards."""
    first, second = names = f"tl{os.getpid()}a", f"tl{os.getpid()}b"
    servers = []
    try:
        for name in names:
            run("ip", "netns", "add", name)
        run("ip", "link", "add", "eth0", "netns", first, "type", "veth", "peer", "name", "eth0", "netns", second)
        for name, address in zip(names, ADDRESSES, strict=True):
            run("ip", "-n", name, "addr", "add", f"{address}/24", "dev", "eth0")
            for interface in ("lo", "eth0"):
                run("ip", "-n", name, "link", "set", interface, "up")
        for key in ("host", "user"):
            run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / key)
        Path("/run/sshd").mkdir(exist_ok=True)
        for name in names:
            options = {
                "AuthorizedKeysFile": folder / "user.pub", "StrictModes": "no", "UsePAM": "no", "PidFile": "none",
                "PermitRootLogin": "yes",
            }  # fmt: skip
            command = ["ip", "netns", "exec", name, "/usr/sbin/sshd", "-D", "-e", "-f", "none", "-p", SSH_PORT]
            command += ["-h", folder / "host"]
            command += [word for option, value in options.items() for word in ("-o", f"{option}={value}")]
            log = (folder / f"{name}.log").open("wb")
            servers.append(subprocess.Popen([*map(str, command)], stdout=log, stderr=log))
            log.close()
        hostfile = folder / "hostfile"
        hostfile.write_text("".join(f"{address} slots=1\n" for address in ADDRESSES))
        arguments = f"-F none -i {folder / 'user'} -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null"
        environment = os.environ | {"PDSH_SSH_ARGS_APPEND": f"{arguments} -o LogLevel=ERROR"}
        hosts = Hosts(names, folder, hostfile, environment)
        wait_until_reached(hosts, arguments)
        yield hosts
    finally:
        for server in servers:
            server.kill()
            server.wait()
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def wait_until_reached(hosts: Hosts, arguments: str) -> None:
    for address in ADDRESSES:
        command = hosts.command("ssh", *arguments.split(), "-p", SSH_PORT, address, "true")
        wait_until(lambda command=command: subprocess.run(command, capture_output=True).returncode == 0)
