"""DeepSpeed's compiled ops: which ones a plan needs, and compiling them once before the ranks start.

Ranks that compile the same op at the same time wait for each other's lock.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from translution.planner.common import RunFailedError
from translution.planner.plans import Plan

from . import op_process
from .compile_times import OPS, OpDuration, compile_jobs, estimate_seconds, format_seconds
from .filesystem import file_system
from .op_records import (
    compiled_libraries,
    extensions_folder,
    libraries_of,
    note_prepared,
    read_durations,
    read_prepared,
)
from .signals import ending_signals_raise

COMPILE_SECONDS = 900.0
"""Seconds allowed to compile one op; the slowest, for NVMe, takes four minutes on two idle cores."""
MESSAGE_SECONDS = 30.0
"""Seconds between two messages about the same compilation."""
UNANNOUNCED_SECONDS = 10.0
"""Seconds without a message for an op whose library exists: loading it takes less, compiling it again takes more."""
_HOST_OPTIMIZERS = {"adamw": "CPUAdamBuilder", "lion": "CPULionBuilder", "adagrad": "CPUAdagradBuilder"}
NVME_OPS = ("PinMemoryBuilder", "AsyncIOBuilder")
"""The ops for NVMe: AsyncIO loads PinMemory first."""

OnMessage = Callable[[str], None]
"""Called with a line of text for the user."""


def needed_ops(plan: Plan) -> tuple[str, ...]:
    """Return the builder names of the ops that a plan's ranks load.

    CPU ranks load the communication op for any number of ranks, one included. An optimizer that is not offloaded is
    torch's, except Lion and the fused AdamW on GPUs; one that is offloaded is DeepSpeed's, except SGD. Without a
    compiler for GPUs the fused AdamW is torch's.

    Source: DeepSpeed 0.19.8, comm/torch.py, runtime/engine.py (`_configure_basic_optimizer`), runtime/swap_tensor/,
    ops/op_builder/async_io.py.
    """
    zero, optimizer = plan.zero, plan.training.optimizer
    ops = ["ShareMemCommBuilder"] if plan.cluster.device == "cpu" else []
    if zero.offload_optimizer.device != "none":
        ops += [_HOST_OPTIMIZERS[optimizer]] if optimizer in _HOST_OPTIMIZERS else []
    elif optimizer == "lion" and plan.cluster.device == "cuda":
        ops.append("FusedLionBuilder")
    elif plan.cluster.device == "cuda" and plan.training.adam == "fused" and has_gpu_compiler():
        ops.append("FusedAdamBuilder")
    return (*ops, *(NVME_OPS if zero.uses_nvme else ()))


def has_gpu_compiler() -> bool:
    """Return whether this machine has a compiler for GPUs: nvcc or hipcc, on PATH or in the toolkit's folder."""
    folders = [os.environ.get(name, "") for name in ("CUDA_HOME", "CUDA_PATH", "ROCM_HOME")] + [
        "/usr/local/cuda",
        "/opt/rocm",
    ]
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), *(f"{folder}/bin" for folder in folders if folder)])
    return any(shutil.which(program, path=path) for program in ("nvcc", "hipcc"))


def op_name(op: str) -> str:
    """Return the name of a builder's op for messages, such as ``CPUAdam``."""
    return op.removesuffix("Builder")


def _no_message(_: str) -> None:
    """Default of `on_message`: do nothing."""


@dataclass(frozen=True, slots=True)
class MissingOp:
    """An op that is not known to be compiled for this Python, torch and DeepSpeed."""

    op: str
    """Name of its builder."""
    has_library: bool
    """True if there is a library, which may be current, or of other versions."""
    seconds: float | None
    """Estimated seconds to compile it; None if nobody has measured them."""
    measured_here: bool
    """True if the estimate is the time that this machine took before."""

    @property
    def duration(self) -> str:
        """The estimated time, for messages."""
        if self.seconds is None:
            return "minutes (never measured)"
        return f"about {format_seconds(self.seconds)}"


def missing_ops(ops: Sequence[str], environment: Mapping[str, str]) -> list[MissingOp]:
    """Return those of some ops that are not known to be compiled, with the time that each will take.

    Args:
        ops: builder names.
        environment: the environment that the ops are compiled and loaded in.
    """
    noted, libraries = read_prepared(environment), compiled_libraries(environment)
    jobs, durations, missing = compile_jobs(environment), read_durations(environment), []
    for op in ops:
        if not noted.has(op, libraries):
            before, has_library = durations.get(op), bool(libraries_of(op, libraries))
            missing.append(MissingOp(op, has_library, estimate_seconds(op, jobs, before), before is not None))
    return missing


def prepare_ops(
    ops: Sequence[str], environment: Mapping[str, str], log: Path, on_message: OnMessage = _no_message
) -> None:
    """Compile ops one after the other, each in a separate process, unless they are compiled already.

    Nothing is said about ops that are compiled.

    Args:
        ops: builder names.
        environment: variables added to this process's environment.
        log: file for the compiler's output.
        on_message: called with a line of text before an op is compiled, every `MESSAGE_SECONDS`, and after it.

    Raises:
        RunFailedError: names the op that does not compile, or waits for the lock of a killed compilation.
    """
    environment = {**os.environ, **environment}
    environment["MAX_JOBS"] = str(compile_jobs(environment))
    remove_stale_locks(environment)
    missing = missing_ops(ops, environment)
    for number, op in enumerate(missing, start=1):
        _prepare(op, f"{number} of {len(missing)}", environment, log, on_message)


def _prepare(missing: MissingOp, number: str, environment: Mapping[str, str], log: Path, on_message: OnMessage) -> None:
    progress = _Progress(missing, number, environment, on_message)
    before, began = libraries_of(missing.op, compiled_libraries(environment)), time.monotonic()
    if _compile(missing.op, environment, log, progress):
        raise RunFailedError(f"DeepSpeed's ops do not compile: {missing.op} (log: {log})")
    seconds = time.monotonic() - began
    compiled = libraries_of(missing.op, compiled_libraries(environment)) != before
    progress.end(seconds, compiled=compiled)
    alone = compiled and not progress.waited
    took = OpDuration(seconds=seconds, jobs=int(environment["MAX_JOBS"])) if alone else None
    note_prepared(missing.op, environment, took)


class _Progress:
    """The messages about one op; without a library it is certainly compiled, otherwise only if it takes long."""

    def __init__(self, missing: MissingOp, number: str, environment: Mapping[str, str], on_message: OnMessage) -> None:
        self._name, self._on_message = op_name(missing.op), on_message
        cores = f"{environment['MAX_JOBS']} idle core{'s' * (environment['MAX_JOBS'] != '1')}"
        place = "as before on this machine" if missing.measured_here else f"on {cores}"
        self._first = (
            f"compiling DeepSpeed's {self._name} ({number}): {missing.duration} {place}; "
            f"kept in {shown_folder(environment)}"
        )
        self._said, self.waited = False, False
        if not self.wait_for(_lock_holder(missing.op, environment), 0) and not missing.has_library:
            self._begin()

    def _begin(self) -> None:
        self._said = True
        self._on_message(self._first)

    @property
    def interval_s(self) -> float:
        """Seconds until the next message."""
        return MESSAGE_SECONDS if self._said else UNANNOUNCED_SECONDS

    def wait_for(self, holder: str | None, seconds: float) -> bool:
        """Report that another process compiles the op, and return whether one does.

        Args:
            holder: the other process, in words; None if there is none.
            seconds: time since the start.
        """
        if holder is not None:
            self._said, again = True, self.waited
            self.waited = True
            text = f"waiting for {holder}, which compiles {self._name}"
            self._on_message(f"still {text}, after {seconds:.0f} s" if again else text)
        return holder is not None

    def wait(self, seconds: float) -> None:
        """Report that the op takes longer than the last interval.

        Args:
            seconds: time since the start.
        """
        if self._said:
            self._on_message(f"still compiling {self._name} after {seconds:.0f} s")
        else:
            self._begin()

    def end(self, seconds: float, *, compiled: bool) -> None:
        """Report that the op is loaded, if anything was said about it."""
        if self._said:
            done = f"compiled {self._name}" if compiled else f"{self._name} was compiled already; it was loaded"
            done = f"{self._name} is compiled, after waiting; it was loaded" if self.waited else done
            self._on_message(f"{done} in {format_seconds(seconds)}")


def _compile(op: str, environment: Mapping[str, str], log: Path, progress: _Progress) -> int:
    """Load an op in a separate process and return its exit code; no compiler outlives the call, nor this process."""
    began = time.monotonic()
    with log.open("ab") as file, ending_signals_raise():
        process = subprocess.Popen(
            op_process.command(op), env=environment, stdout=file, stderr=file, start_new_session=True
        )
        try:
            while (left := began + COMPILE_SECONDS - time.monotonic()) > 0:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    return process.wait(min(left, progress.interval_s))
                seconds = time.monotonic() - began
                if not progress.wait_for(_lock_holder(op, environment, session=process.pid), seconds):
                    progress.wait(seconds)
            raise RunFailedError(
                f"DeepSpeed's ops did not compile in {COMPILE_SECONDS:.0f} s: {op}: if nothing else is compiling, "
                f"remove the stale file named lock under {extensions_folder(environment)} (log: {log})"
            )
        finally:
            op_process.kill_session(process.pid)
            process.wait()


def shown_folder(environment: Mapping[str, str]) -> str:
    """Return the folder of compiled ops for messages, with ``~`` for the home folder."""
    folder = extensions_folder(environment)
    return f"~/{folder.relative_to(Path.home())}" if folder.is_relative_to(Path.home()) else str(folder)


def _holders(paths: Collection[Path]) -> dict[Path, list[int]]:
    """Return the processes that hold each of some files open, as far as this process may see them."""
    held: dict[Path, list[int]] = {}
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):
            if (path := link.readlink()) in paths:
                held.setdefault(path, []).append(int(link.parent.parent.name))
    return held


def _lock_holder(op: str, environment: Mapping[str, str], *, session: int | None = None) -> str | None:
    """Return in words who holds the lock of an op, or None if nobody does, or only a process of a session."""
    locks = {path.resolve() for path in extensions_folder(environment).glob(f"**/{OPS[op].library}/lock")}
    for lock in locks:
        holders = set(_holders(locks).get(lock, ()))
        if session is not None and holders & op_process.session_members(session):
            return None
        if holders or lock.exists():
            return f"process {min(holders)}" if holders else f"the process that holds {lock}"
    return None


def remove_stale_locks(environment: Mapping[str, str] = os.environ) -> list[Path]:
    """Remove the locks of killed compilations: a process that loads such an op waits for its lock forever.

    torch holds a lock file open while it compiles, so a lock that no process holds open is stale. On a network file
    system another machine may hold it, so a lock there must also be older than any compilation.

    Args:
        environment: environment variables that locate the folder of compiled ops.

    Returns:
        The removed locks.

    Source: torch 2.13, utils/file_baton.py and utils/cpp_extension.py.
    """
    locks = [path.resolve() for path in extensions_folder(environment).glob("**/lock")]
    if not locks or not Path("/proc/self/fd").exists():
        return []
    held, removed = _holders(locks), list[Path]()
    for lock in locks:
        with contextlib.suppress(OSError):
            if lock not in held and (_is_local(lock) or time.time() - lock.stat().st_mtime > COMPILE_SECONDS):
                lock.unlink()
                removed.append(lock)
    return removed


def _is_local(path: Path) -> bool:
    """Return True if only this machine can see a file; a network file system may hold other machines' locks."""
    return not file_system(path).startswith(("nfs", "lustre", "ceph", "gpfs", "beegfs", "fuse", "cifs", "9p"))
