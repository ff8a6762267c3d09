"""Processes of ranks that begin with torch and DeepSpeed imported: forks of one that has done nothing else.

Importing takes each rank five seconds of a run of ten. Runs that are launched as users launch them start as theirs do.
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
    "translution.distributed.training.trainer",
    "deepspeed.runtime.engine",
    "deepspeed.runtime.zero.muon.original_muon",
]
_context: list[ForkServerContext] = []


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
    """Where processes are forked from; its own environment is that of the first to ask."""
    if not _context:
        made = multiprocessing.get_context("forkserver")
        made.set_forkserver_preload(PRELOADED)
        with environment_of(environment):
            multiprocessing.forkserver.ensure_running()  # type: ignore[attr-defined]
        _context.append(made)
    return _context[0]


def start(arguments: Sequence[str], environment: Mapping[str, str], log: Path) -> ForkServerProcess:
    """Start what ``python ARGUMENTS`` would, ``-m MODULE`` or a file, printing to a log."""
    process = context(environment).Process(target=run, args=(list(arguments), dict(environment), str(log)))
    process.start()
    return process


def run(arguments: list[str], environment: dict[str, str], log: str) -> None:
    """The process itself."""
    import torch

    os.environ.clear()
    os.environ.update(environment)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(file, stream)
    # Read from the environment when torch was imported.
    torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        sys.path.insert(0, str(Path(arguments[0]).parent))
        runpy.run_path(arguments[0], run_name="__main__")
