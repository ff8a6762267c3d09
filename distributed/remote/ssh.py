"""Run commands on other hosts through ssh."""

from __future__ import annotations

import os
import shlex
import subprocess
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

SSH_ARGUMENTS = "PDSH_SSH_ARGS_APPEND"
"""Environment variable with additional ssh arguments; pdsh reads it too."""
_OPTIONS = ("-o", "BatchMode=yes", "-o", "ConnectTimeout=10", "-o", "ServerAliveInterval=15")


@dataclass(frozen=True)
class Ssh:
    """Settings of the ssh connection to hosts."""

    port: int | None = None
    """Port of the ssh servers; None uses ssh's default."""

    def arguments(self) -> list[str]:
        """Return the arguments between ``ssh`` and the host."""
        own = shlex.split(os.environ.get(SSH_ARGUMENTS, ""))
        return [*_OPTIONS, *own, *(() if self.port is None else ("-p", str(self.port)))]

    def start(self, host: str, command: Sequence[str], environment: Mapping[str, str]) -> subprocess.Popen[str]:
        """Start a command on a host, in its root folder; every argument is quoted for the remote shell."""
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
class RemoteResult:
    """Exit code and output of a command on a host."""

    host: str
    exit_code: int
    output: str
    errors: str

    @property
    def unreachable(self) -> bool:
        """True if ssh itself failed, rather than the command."""
        return self.exit_code == 255 and not self.output

    @property
    def last_error(self) -> str:
        """The last line on stderr, which normally names the problem."""
        lines = [line.strip() for line in self.errors.splitlines() if line.strip()]
        return lines[-1][:300] if lines else f"exit code {self.exit_code}"


def wait_for_host(host: str, process: subprocess.Popen[str], timeout_s: float) -> RemoteResult:
    """Return the result of a started command; after the timeout it is killed, with exit code 255."""
    try:
        output, errors = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return RemoteResult(host, 255, "", f"no answer within {timeout_s:.0f} s")
    return RemoteResult(host, process.returncode, output, errors)


OnHostLine = Callable[[str, str], None]
"""Called with a host and a line that its command printed."""


def follow_host(host: str, process: subprocess.Popen[str], timeout_s: float, on_line: OnHostLine) -> RemoteResult:
    """Do what `wait_for_host` does, and report each line of output as soon as the command has printed it."""
    output, errors = process.stdout, process.stderr
    assert output is not None
    assert errors is not None
    told: list[str] = []
    reader = threading.Thread(target=lambda: told.append(errors.read()), daemon=True)
    reader.start()
    late = threading.Event()

    def give_up() -> None:
        late.set()
        process.kill()

    timer = threading.Timer(timeout_s, give_up)
    timer.start()
    lines = []
    with process:  # Closes the pipes.
        try:
            for line in output:
                lines.append(line)
                on_line(host, line.rstrip())
            code = process.wait()
            reader.join()
        finally:
            timer.cancel()
            process.kill()
    if late.is_set():
        return RemoteResult(host, 255, "", f"no answer within {timeout_s:.0f} s")
    return RemoteResult(host, code, "".join(lines), "".join(told))


def run_on_hosts(
    hosts: Sequence[str],
    commands: Sequence[Sequence[str]],
    ssh: Ssh,
    environment: Mapping[str, str],
    timeout_s: float,
    on_line: OnHostLine | None = None,
) -> list[RemoteResult]:
    """Run one command per host in parallel and return the results in the same order.

    Args:
        hosts: host names.
        commands: the command for each host.
        ssh: connection settings.
        environment: variables to set on every host.
        timeout_s: seconds until a command is killed.
        on_line: called with each line of output, for one host at a time; None reports nothing before the end.
    """
    lock = threading.Lock()

    def report(host: str, line: str) -> None:
        assert on_line is not None
        with lock:
            on_line(host, line)

    def wait(host: str, process: subprocess.Popen[str]) -> RemoteResult:
        if on_line is None:
            return wait_for_host(host, process, timeout_s)
        return follow_host(host, process, timeout_s, report)

    started = [ssh.start(host, command, environment) for host, command in zip(hosts, commands, strict=True)]
    with ThreadPoolExecutor(max_workers=max(1, len(hosts))) as pool:
        return list(pool.map(wait, hosts, started))
