"""The hosts of a run: reading a hostfile, and running a command on every one of them through ssh."""

from __future__ import annotations

import os
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

SSH_ARGUMENTS = "PDSH_SSH_ARGS_APPEND"
"""Further arguments for ssh, in the environment; pdsh reads them from there too."""
_OPTIONS = ("-o", "BatchMode=yes", "-o", "ConnectTimeout=10", "-o", "ServerAliveInterval=15")


@dataclass(frozen=True)
class Ssh:
    """How hosts are reached."""

    port: int | None = None
    """None is ssh's own."""

    def arguments(self) -> list[str]:
        """What stands between ``ssh`` and the host."""
        own = shlex.split(os.environ.get(SSH_ARGUMENTS, ""))
        return [*_OPTIONS, *own, *(() if self.port is None else ("-p", str(self.port)))]

    def start(self, host: str, command: Sequence[str], environment: Mapping[str, str]) -> subprocess.Popen[str]:
        """Start a command on a host, in its root folder; every word arrives as it is."""
        words = ["cd", "/", "&&", "exec", "env", *(f"{name}={value}" for name, value in environment.items()), *command]
        text = " ".join(word if word == "&&" else shlex.quote(word) for word in words)
        return subprocess.Popen(
            ["ssh", *self.arguments(), host, text],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        )


@dataclass(frozen=True)
class Answer:
    """What a command on a host gave."""

    host: str
    exit_code: int
    output: str
    errors: str

    @property
    def unreachable(self) -> bool:
        """Whether ssh itself failed, and not the command."""
        return self.exit_code == 255 and not self.output

    @property
    def last_words(self) -> str:
        """The last line on stderr, which names what went wrong."""
        lines = [line.strip() for line in self.errors.splitlines() if line.strip()]
        return lines[-1][:300] if lines else f"exit code {self.exit_code}"


def wait_for(host: str, process: subprocess.Popen[str], timeout_s: float) -> Answer:
    """A started command's answer; a host that takes longer is ended and answers with exit code 255."""
    try:
        output, errors = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return Answer(host, 255, "", f"no answer within {timeout_s:.0f} s")
    return Answer(host, process.returncode, output, errors)


def run_on(
    hosts: Sequence[str], commands: Sequence[Sequence[str]], ssh: Ssh, environment: Mapping[str, str], timeout_s: float
) -> list[Answer]:
    """Run a command on each host at the same time; their answers in the same order."""
    started = [ssh.start(host, command, environment) for host, command in zip(hosts, commands, strict=True)]
    with ThreadPoolExecutor(max_workers=max(1, len(hosts))) as pool:
        return list(pool.map(wait_for, hosts, started, [timeout_s] * len(hosts)))
