"""DeepSpeed's compiled ops: which ones a plan needs, and compiling them once before the ranks start.

Ranks that compile the same op at the same time wait for each other's lock.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from pydantic import TypeAdapter

from translution.planner.common import InputError, RunFailedError, Schema, TranslutionError, parse_json, write_text
from translution.planner.plans import Plan

from .filesystem import file_system
from .signals import ending_signals_raise

_COMPILE = """
import sys
from deepspeed.accelerator import get_accelerator
for name in sys.argv[1:]:
    builder = get_accelerator().create_op_builder(name)
    if builder is not None:
        builder.load()
"""
COMPILE_SECONDS = 900.0
"""Seconds allowed to compile one op; the slowest, for NVMe, takes four minutes on two idle cores."""
_PREPARED = "translution-prepared.json"
_OPTIMIZERS = {"adamw": "CPUAdamBuilder", "lion": "CPULionBuilder", "adagrad": "CPUAdagradBuilder"}


def needed_ops(plan: Plan) -> tuple[str, ...]:
    """Return the builder names of the ops that a plan's ranks load."""
    zero = plan.zero
    ops = ["ShareMemCommBuilder"] if plan.cluster.device == "cpu" else []
    if zero.offload_optimizer.device != "none" and plan.training.optimizer in _OPTIMIZERS:
        ops.append(_OPTIMIZERS[plan.training.optimizer])
    if zero.uses_nvme:
        ops.append("AsyncIOBuilder")
    return tuple(ops)


def prepare_ops(ops: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
    """Compile ops in one separate process, unless they are compiled already.

    Args:
        ops: builder names.
        environment: variables added to this process's environment.
        log: file for the compiler's output.

    Raises:
        RunFailedError: if an op does not compile, or waits for the lock of a killed compilation.
    """
    environment = {**os.environ, **environment}
    remove_stale_locks(environment)
    if _are_prepared(ops, environment):
        return
    if _compile(ops, environment, log):
        raise RunFailedError(f"DeepSpeed's ops do not compile: {', '.join(ops)} (log: {log})")
    _note_prepared(ops, environment)


def _compile(ops: Sequence[str], environment: Mapping[str, str], log: Path) -> int:
    """Load ops in a separate process and return its exit code; no compiler outlives the call."""
    seconds = COMPILE_SECONDS * len(ops)
    with log.open("ab") as file, ending_signals_raise():
        process = subprocess.Popen(
            [sys.executable, "-c", _COMPILE, *ops], env=environment, stdout=file, stderr=file, start_new_session=True
        )
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise RunFailedError(
                f"DeepSpeed's ops did not compile in {seconds:.0f} s: if nothing else is "
                f"compiling, remove the stale file named lock under {extensions_folder(environment)} (log: {log})"
            ) from None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


class _Prepared(Schema):
    """Record of the ops found compiled; comparing it with the files saves the seconds that loading the ops takes."""

    ops: tuple[str, ...]
    """Builder names of the ops."""
    made_with: dict[str, str]
    """Versions and paths that compiled ops depend on."""
    libraries: dict[str, int]
    """Modification time of each compiled file in ns, by its path."""


def _made_with(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the versions and paths that compiled ops depend on, in addition to DeepSpeed's sources."""
    found = {"python": sys.version, "executable": sys.executable, "CXX": environment.get("CXX", "")}
    for package in ("torch", "deepspeed", "ninja"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found | {"node": platform.node(), "machine": platform.machine()}


def _libraries(environment: Mapping[str, str]) -> dict[str, int]:
    folder = extensions_folder(environment)
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.glob("**/*.so")}


def _are_prepared(ops: Sequence[str], environment: Mapping[str, str]) -> bool:
    path = extensions_folder(environment) / _PREPARED
    try:
        noted = parse_json(_NOTE, path.read_bytes(), str(path))
    except (OSError, InputError):
        return False
    same = noted.made_with == _made_with(environment) and noted.libraries == _libraries(environment)
    return same and set(ops) <= set(noted.ops)


def _note_prepared(ops: Sequence[str], environment: Mapping[str, str]) -> None:
    libraries, made_with = _libraries(environment), _made_with(environment)
    path = extensions_folder(environment) / _PREPARED
    with contextlib.suppress(OSError, InputError):
        noted = parse_json(_NOTE, path.read_bytes(), str(path))
        if noted.made_with == made_with and noted.libraries.items() <= libraries.items():
            ops = sorted({*ops, *noted.ops})
    with contextlib.suppress(OSError, TranslutionError):
        note = _Prepared(ops=tuple(ops), made_with=made_with, libraries=libraries)
        write_text(path, note.model_dump_json(indent=2) + "\n")


_NOTE: TypeAdapter[_Prepared] = TypeAdapter(_Prepared)


def extensions_folder(environment: Mapping[str, str] = os.environ) -> Path:
    """Return the folder where torch stores compiled ops."""
    return Path(environment.get("TORCH_EXTENSIONS_DIR", Path.home() / ".cache" / "torch_extensions"))


def _held_files() -> set[Path]:
    """Return the files that processes of this machine hold open, as far as this process may see them."""
    held = set()
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):
            held.add(link.readlink())
    return held


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
    held, removed = _held_files(), []
    for lock in locks:
        with contextlib.suppress(OSError):
            if lock not in held and (_is_local(lock) or time.time() - lock.stat().st_mtime > COMPILE_SECONDS):
                lock.unlink()
                removed.append(lock)
    return removed


def _is_local(path: Path) -> bool:
    """Return True if only this machine can see a file; a network file system may hold other machines' locks."""
    return not file_system(path).startswith(("nfs", "lustre", "ceph", "gpfs", "beegfs", "fuse", "cifs", "9p"))
