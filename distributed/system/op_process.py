"""The process that compiles one of DeepSpeed's ops, and the end of its session.

ninja gives every compiler a process group of its own, so a signal to the group of its parent does not reach them. The
process therefore begins a session, and what ends it ends the session: its launcher, or a thread of the process itself
when the launcher has been killed. A compiler that nobody waits for would keep the cores busy for minutes.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import sys
import threading
import time
from collections.abc import MutableMapping
from pathlib import Path

_POLL_S = 0.2
_KILL_S = 5.0


def command(op: str) -> list[str]:
    """Return the command that compiles and loads an op as long as this process lives.

    Args:
        op: name of its builder.
    """
    return [sys.executable, "-c", f"from {__name__} import compile_op; compile_op()", op, str(os.getpid())]


def compile_op() -> None:
    """Load the op of the first argument; kill this session when the process of the second one has died."""
    op, launcher = sys.argv[1], int(sys.argv[2])
    threading.Thread(target=_end_with, args=(launcher,), daemon=True).start()
    simplify_gpu_architectures()
    from deepspeed.accelerator import get_accelerator

    builder = get_accelerator().create_op_builder(op)
    if builder is not None:
        builder.load()


def simplify_gpu_architectures(environment: MutableMapping[str, str] = os.environ) -> None:
    """Write TORCH_CUDA_ARCH_LIST without suffixes such as that of "9.0a", which DeepSpeed cannot read.

    Some images set it. DeepSpeed's ops use nothing of what the suffix stands for.
    """
    name = "TORCH_CUDA_ARCH_LIST"
    if name in environment:
        environment[name] = re.sub(r"(\d\.\d+)[af]\b", r"\1", environment[name])


def _end_with(launcher: int) -> None:
    # A process whose parent has died gets another parent.
    while os.getppid() == launcher:
        time.sleep(_POLL_S)
    kill_session(os.getsid(0))
    os.kill(os.getpid(), signal.SIGKILL)


def session_members(session: int) -> set[int]:
    """Return the living processes of a session; none where there is no /proc."""
    members = set()
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, _, found = path.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[:4]
            if int(found) == session and state not in ("Z", "X"):
                members.add(int(path.parent.name))
    return members


def kill_session(session: int) -> None:
    """Kill all processes of a session, except this one if it is a member, and wait until they are dead.

    Args:
        session: process id of its first process.
    """
    own, deadline = os.getpid(), time.monotonic() + _KILL_S
    while (members := session_members(session) - {own}) and time.monotonic() < deadline:
        # A process may start another one after it was seen.
        for member in members:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(member, signal.SIGKILL)
        time.sleep(_POLL_S / 20)
    if not Path("/proc/self/stat").exists() and session != os.getsid(0):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(session, signal.SIGKILL)
