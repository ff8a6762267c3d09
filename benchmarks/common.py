"""Shared parts of the benchmarks: layers, parity checks, timing, operation counts, machine description."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from translution.models import AlphaTranslution, Translution
from translution.planner.common import processor, usable_cores
from translution.planner.config import RelationGeometry

TOLERANCE = 1e-10
"""Allowed difference from the reference in float64."""


class Case(NamedTuple):
    """One layer of a model of the paper."""

    layout: dict[str, Any]
    """Arguments of the layer that describe the arrangement of the tokens."""
    dim: int
    heads: int
    batch: int
    gather: bool
    """True if the gathered implementation fits in memory at this batch size."""
    alpha: bool = False
    """α-Translution instead of Translution."""


def make(
    case: Case, implementation: str = "grouped", **factory: Any
) -> tuple[Translution | AlphaTranslution, torch.Tensor]:
    """Return the layer of a case and an input (batch, tokens, dim); ``factory`` holds the device and dtype."""
    torch.manual_seed(0)
    kind = AlphaTranslution if case.alpha else Translution
    layer = kind(case.dim, case.heads, **case.layout, implementation=implementation).to(**factory)
    x = torch.randn(case.batch, layer.geometry.tokens, case.dim).to(**factory)
    return layer, x.requires_grad_()


def step(layer: nn.Module, x: torch.Tensor) -> None:
    """Run forward and backward; gradients are newly allocated, as in training."""
    layer.zero_grad(set_to_none=True)
    x.grad = None
    layer(x).sum().backward()


def check_parity(implementation: str = "grouped", device: str = "cpu") -> float:
    """Return the largest float64 difference of output and gradients from the gathered implementation.

    Several token layouts are compared.

    Raises:
        SystemExit: if the difference exceeds the tolerance.
    """
    worst = 0.0
    layouts: list[dict[str, Any]] = [
        {"grid": (3, 4), "class_token": True},
        {"grid": (4, 3)},
        {"length": 7},
        {"length": 7, "causal": True},
    ]
    for layout in layouts:
        case = Case(layout, 12, 3, 2, True)
        results = []
        for name in (implementation, "gather"):
            layer, x = make(case, name, device=device, dtype=torch.float64)
            out = layer(x)
            weights = torch.linspace(-1, 1, out.numel(), device=device).view_as(out).to(out.dtype)
            grads = torch.autograd.grad(out, [x, *layer.parameters()], weights)
            results.append([out, *grads])
        worst = max(worst, *(float((a - b).detach().abs().max()) for a, b in zip(*results, strict=True)))
    if not worst <= TOLERANCE:
        sys.exit(
            f"parity: {implementation} and gathered differ by {worst:.1e} in float64, more than {TOLERANCE:.0e}: "
            "no timings are shown"
        )
    return worst


def seconds(run: Callable[[], None], repeats: int, wait: Callable[[], None] = lambda: None) -> float:
    """Return the median time of a call in seconds, after one call that is not counted.

    Args:
        run: function to time.
        repeats: number of counted calls.
        wait: function that returns when the device has finished its work.
    """
    run()
    times = []
    for _ in range(repeats):
        wait()
        begin = time.perf_counter()
        run()
        wait()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def alternate(first: Callable[[], None], second: Callable[[], None], repeats: int) -> tuple[float, float, float]:
    """Return the median seconds of two alternating calls, and the median ratio first / second of a turn.

    Alternation makes a temporary slowdown of the machine affect both calls.
    """
    first()
    second()
    turns = [(seconds_once(first), seconds_once(second)) for _ in range(repeats)]
    times = [statistics.median(column) for column in zip(*turns, strict=True)]
    return times[0], times[1], statistics.median(own / other for own, other in turns)


def seconds_once(run: Callable[[], None]) -> float:
    """Return the seconds of one call."""
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def count_operations(geometry: RelationGeometry, batch: int, dim: int) -> int:
    """Return the FLOPs of forward and backward with roles qkv, including the recomputed rows of backward."""
    return 3 * 4 * 2 * batch * geometry.table_rows("k") * dim * dim


def describe_run(script: str) -> dict[str, Any]:
    """Return the command, the date, the machine and the versions, for the report."""
    return {
        "command": " ".join(["python", f"benchmarks/{script}.py", *sys.argv[1:]]),
        "date": datetime.date.today().isoformat(),
        "machine": {
            "processor": processor(),
            "cores": usable_cores(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "translution": importlib.metadata.version("translution-scale"),
        },
    }


def write_report(folder: Path | None, name: str, document: dict[str, Any], text: str) -> None:
    """Print the report; if there is a folder, write the report and its raw figures to it."""
    print(text)
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.json").write_text(json.dumps(document, indent=2) + "\n")
        (folder / f"{name}.md").write_text(text)
