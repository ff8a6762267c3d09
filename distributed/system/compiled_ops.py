"""DeepSpeed's compiled ops: which a plan needs, and compiling them once before ranks would race for them."""

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

from translution.planner.common.errors import InputError, RunFailedError, TranslutionError
from translution.planner.common.files import write_text
from translution.planner.common.schema import Schema, parse_json
from translution.planner.plans.plan import Plan

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
"""How long one op may take: the longest, for NVMe, takes four minutes on two quiet cores."""
_PREPARED = "translution-prepared.json"
_OPTIMIZERS = {"adamw": "CPUAdamBuilder", "lion": "CPULionBuilder", "adagrad": "CPUAdagradBuilder"}


def needed_ops(plan: Plan) -> tuple[str, ...]:
    """Names of the builders of what a plan's ranks load."""
    zero = plan.zero
    ops = ["ShareMemCommBuilder"] if plan.cluster.device == "cpu" else []
    if zero.offload_optimizer.device != "none" and plan.training.optimizer in _OPTIMIZERS:
        ops.append(_OPTIMIZERS[plan.training.optimizer])
    if zero.uses_nvme:
        ops.append("AsyncIOBuilder")
    return tuple(ops)


def prepare_ops(ops: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
    """Compile ops in one process; those that are compiled already are only loaded, or looked at.

    Args:
        ops: names of builders.
        environment: added to this process's own.
        log: where the compiler's words go.

    Raises:
        RunFailedError: if one does not compile, or waits on the lock that a killed compilation left.
    """
    environment = {**os.environ, **environment}
    remove_stale_locks(environment)
    if _are_prepared(ops, environment):
        return
    if _compile(ops, environment, log):
        raise RunFailedError(f"DeepSpeed's ops do not compile: {', '.join(ops)} (log: {log})")
    _note_prepared(ops, environment)


def _compile(ops: Sequence[str], environment: Mapping[str, str], log: Path) -> int:
    """Load ops in a process of its own; its exit code. No compiler outlives the call, whatever ends it."""
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
    """What was found prepared last: loading ops to see that takes seconds, and a look at their files none."""

    ops: tuple[str, ...]
    made_with: dict[str, str]
    libraries: dict[str, int]
    """When each file was written, in ns."""


def _made_with(environment: Mapping[str, str]) -> dict[str, str]:
    """What compiled ops depend on, beside DeepSpeed's sources."""
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
    """Where torch keeps compiled ops."""
    return Path(environment.get("TORCH_EXTENSIONS_DIR", Path.home() / ".cache" / "torch_extensions"))


def _held_files() -> set[Path]:
    """Files that some process of this machine holds open, as far as this one may see."""
    held = set()
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):
            held.add(link.readlink())
    return held


def remove_stale_locks(environment: Mapping[str, str] = os.environ) -> list[Path]:
    """Remove the locks of compilations that were killed: whoever loads the op waits for them for ever, silently.

    torch holds its lock open while it compiles, so that a lock that no process holds is stale. One that
    another machine may hold, on a network's file system, must be older than any compilation.

    Args:
        environment: says where the extensions lie.

    Returns:
        The locks that were removed.

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
    """Whether only this machine can see a file; network file systems have others' locks."""
    return not file_system(path).startswith(("nfs", "lustre", "ceph", "gpfs", "beegfs", "fuse", "cifs", "9p"))
