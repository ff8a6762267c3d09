"""The command line of the check, and its parts with their limits, the most valuable first."""

from __future__ import annotations

import argparse
import functools
import importlib
import os
import shlex
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from translution.planner.common import TranslutionError

from .machine import Context, describe, environment_of_parts
from .results import Result
from .runner import SUMMARY, Part, Runner

MINUTES = 8.0
"""Minutes that the limits below are for; they are scaled to those given."""
PARTS: dict[str, tuple[float, str]] = {
    "ops": (240.0, "ops:compile_ops"),
    "parity": (75.0, "parity:check_parity"),
    "operators": (80.0, "operators:measure_operators"),
    "memory": (135.0, "memory:measure_memory"),
    "times": (50.0, "times:measure_times"),
    "largest": (95.0, "largest:train_largest"),
    "transfers": (35.0, "transfers:measure_transfers"),
}
"""By name: the limit in seconds, and the module and function. The limits, without that of ops, add up to less than
the minutes, since parts are also given time to end."""
BACKGROUND = "ops"


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="gpu_check.py", description="Measure this project on a GPU: memory, time and parity, within minutes."
    )
    parser.add_argument("--out", type=Path, default=Path("reports/gpu"), help="folder for the results")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu rehearses the check")
    parser.add_argument("--small", action="store_true", help="tiny sizes, for a rehearsal")
    parser.add_argument("--parts", default=",".join(PARTS), help=f"comma-separated, of {', '.join(PARTS)}")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="limit of all parts together")
    parser.add_argument("--run-part", choices=list(PARTS), help=argparse.SUPPRESS)
    parser.add_argument("--run-rank", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=60.0, help=argparse.SUPPRESS)
    return parser


def _own_words(arguments: argparse.Namespace) -> tuple[str, ...]:
    script = str(Path(__file__).resolve().parents[2] / "scripts" / "gpu_check.py")
    words = (sys.executable, script, "--out", str(arguments.out), "--device", arguments.device)
    return (*words, *(["--small"] if arguments.small else []))


def _check(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> list[str]:
    """Return the names of the chosen parts; end with exit code 2 if an argument is not allowed."""
    names = [name.strip() for name in arguments.parts.split(",") if name.strip()]
    for name in names:
        if name not in PARTS:
            parser.error(f"--parts: {name!r} is not allowed: must be of {', '.join(PARTS)}")
    if not names:
        parser.error(f"--parts: is empty: must be of {', '.join(PARTS)}")
    if not 0 < arguments.minutes <= 60:
        parser.error(f"--minutes: {arguments.minutes} is not allowed: must be above 0 and at most 60")
    if arguments.device == "cuda" and not _has_gpu():
        parser.error("--device: 'cuda' is not allowed: this machine has no CUDA GPU; --device cpu --small rehearses")
    try:
        arguments.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out: {str(arguments.out)!r} cannot be written: {error.strerror}")
    return [name for name in PARTS if name in names]


def _has_gpu() -> bool:
    import torch

    # A count from the driver's library; torch makes no context for it.
    return torch.version.cuda is not None and torch.cuda.device_count() > 0


def _raise_exit(number: int, _: FrameType | None) -> None:
    raise SystemExit(128 + number)


def run_part(name: str, arguments: argparse.Namespace) -> None:
    """Run one part in this process."""
    # Folders of temporary files are removed when the part is ended at its limit.
    signal.signal(signal.SIGTERM, _raise_exit)
    module, function = PARTS[name][1].split(":")
    result = Result(arguments.out / f"{name}.json", name)
    context = Context(arguments.device, arguments.small, arguments.seconds, arguments.out, result)
    getattr(importlib.import_module(f".{module}", __package__), function)(context)
    result.put()


def _preload() -> None:
    """Import what the parts of a rehearsal need, once: they are forks. A part on a GPU has its own process."""
    for name in ("deepspeed.runtime.engine", "translution.distributed.training.trainer"):
        importlib.import_module(name)
    for name in ("largest", "memory", "operators", "parity", "times", "transfers"):
        importlib.import_module(f".{name}", __package__)


def _forked_part(name: str, arguments: argparse.Namespace, seconds: float) -> None:
    import torch

    torch.set_num_threads(1)
    arguments.seconds = seconds
    run_part(name, arguments)


def main(words: Sequence[str] | None = None) -> int:
    """Run the check; return 0 if all parts ended well, 1 otherwise."""
    parser = make_parser()
    arguments = parser.parse_args(words)
    if arguments.run_rank is not None:
        from .rank import run_rank_here

        run_rank_here(arguments.run_rank)
        return 0
    if arguments.run_part is not None:
        try:
            run_part(arguments.run_part, arguments)
        except TranslutionError as error:
            raise SystemExit(str(error)) from None
        return 0
    names = _check(arguments, parser)
    scale = arguments.minutes / MINUTES
    own = _own_words(arguments)
    environment = environment_of_parts(arguments.device)
    if arguments.device == "cpu":
        os.environ.update(environment)
        _preload()
    parts = []
    for name in names:
        work = functools.partial(_forked_part, name, arguments) if arguments.device == "cpu" else None
        command = (*own, "--run-part", name)
        parts.append(Part(name, PARTS[name][0] * scale, command, work, background=name == BACKGROUND))
    signal.signal(signal.SIGTERM, _raise_exit)
    given = sys.argv[1:] if words is None else words
    about = describe(shlex.join(["python", "scripts/gpu_check.py", *given]), arguments.device, small=arguments.small)
    runner = Runner(arguments.out, about, arguments.minutes * 60, environment, lambda line: print(line, flush=True))
    good = runner.run(parts)
    print(f"wrote {arguments.out / SUMMARY}")
    return 0 if good else 1
