"""Start ranks with torch and DeepSpeed already imported, as forks of a process that has done nothing else.

Importing takes each rank five of the ten seconds of a run. Tests of `launch` start ranks as users do.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import runpy
import sys
from collections.abc import Iterator, Mapping, Sequence
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path

PRELOADED = [
    "translution.distributed.training.rank",
    "deepspeed.runtime.engine",
    "deepspeed.module_inject",
    "torch._dynamo",
    "setuptools.command.build_ext",
    "programs.processor",
]
TESTS = Path(__file__).resolve().parents[1]
_context: list[ForkServerContext] = []
_kept: list[dict[str, object]] = []
"""What scripts leave behind. Freeing DistributedDataParallel while gloo's thread ends its last reduction hangs: the one
holds Python's lock and waits for the thread, which waits for the lock."""


@contextlib.contextmanager
def environment_of(values: Mapping[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def context(environment: Mapping[str, str]) -> ForkServerContext:
    """Return the fork server's context; the server's own environment is that of the first call."""
    if not _context:
        made = multiprocessing.get_context("forkserver")
        made.set_forkserver_preload(PRELOADED)
        # The C library reads GLIBC_TUNABLES when a process starts; forks that measure their process run without. The
        # fork server of Python 3.11 does not have this process's module path and keeps silent about what it lacks.
        path = os.pathsep.join(filter(None, [str(TESTS), environment.get("PYTHONPATH")]))
        with environment_of({**environment, "PYTHONPATH": path}):
            os.environ.pop("GLIBC_TUNABLES", None)
            multiprocessing.forkserver.ensure_running()  # type: ignore[attr-defined]
        _context.append(made)
    return _context[0]


def start(arguments: Sequence[str], environment: Mapping[str, str], log: Path) -> ForkServerProcess:
    """Start ``python ARGUMENTS``, where ARGUMENTS is ``-m MODULE …`` or a file, with its output in a log."""
    process = context(environment).Process(target=run, args=(list(arguments), dict(environment), str(log)))
    process.start()
    return process


def run(arguments: list[str], environment: dict[str, str], log: str) -> None:
    """Run the arguments in the forked process."""
    import torch

    missing = set(PRELOADED) - set(sys.modules)
    os.environ.clear()
    os.environ.update(environment)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(file, stream)
    assert not missing, f"the fork server could not import {missing}"
    # torch read OMP_NUM_THREADS when the fork server imported it.
    torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        _kept.append(runpy.run_module(arguments[1], run_name="__main__", alter_sys=True))
    else:
        sys.argv = arguments
        sys.path.insert(0, str(Path(arguments[0]).parent))
        _kept.append(runpy.run_path(arguments[0], run_name="__main__"))
