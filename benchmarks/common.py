"""What the benchmarks share: layers, parity, timing, counts of operations, and the machine's description."""

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

from translution.models import Translution
from translution.planner.common.machine import usable_cores
from translution.planner.common.provenance import processor
from translution.planner.config.geometry import RelationGeometry

TOLERANCE = 1e-10


class Case(NamedTuple):
    """One layer of a model of the paper, and whether the gathered way fits in memory at its batch."""

    place: dict[str, Any]
    dim: int
    heads: int
    batch: int
    gather: bool


def make(case: Case, implementation: str = "grouped", **factory: Any) -> tuple[Translution, torch.Tensor]:
    """The layer of a case and an input for it, on the device and in the dtype given."""
    torch.manual_seed(0)
    layer = Translution(case.dim, case.heads, **case.place, implementation=implementation).to(**factory)
    x = torch.randn(case.batch, layer.geometry.tokens, case.dim).to(**factory)
    return layer, x.requires_grad_()


def step(layer: nn.Module, x: torch.Tensor) -> None:
    """Forward and backward, gradients made anew as in training."""
    layer.zero_grad(set_to_none=True)
    x.grad = None
    layer(x).sum().backward()


def check_parity(implementation: str = "grouped", device: str = "cpu") -> float:
    """Largest difference in float64 of output and gradients from the gathered way's, in each geometry.

    Raises:
        SystemExit: if it is above the tolerance.
    """
    worst = 0.0
    places: list[dict[str, Any]] = [
        {"grid": (3, 4), "class_token": True},
        {"grid": (4, 3)},
        {"length": 7},
        {"length": 7, "causal": True},
    ]
    for place in places:
        case = Case(place, 12, 3, 2, True)
        results = []
        for way in (implementation, "gather"):
            layer, x = make(case, way, device=device, dtype=torch.float64)
            out = layer(x)
            weights = torch.linspace(-1, 1, out.numel(), device=device).view_as(out).to(out.dtype)
            grads = torch.autograd.grad(out, [x, *layer.parameters()], weights)
            results.append([out, *grads])
        worst = max(worst, *(float((a - b).detach().abs().max()) for a, b in zip(*results, strict=True)))
    if not worst <= TOLERANCE:
        sys.exit(
            f"parity: {implementation} and gathered differ by {worst:.1e} in float64, above {TOLERANCE:.0e}: "
            "no speed is shown"
        )
    return worst


def seconds(run: Callable[[], None], repeats: int, wait: Callable[[], None] = lambda: None) -> float:
    """Median time of a call, after one that is not counted.

    Args:
        run: what is timed.
        repeats: counted calls.
        wait: returns when the device has done all it was given.
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
    """Median times of two calls, made by turns, and the median of first / second of each turn.

    A machine that is slow for a while is so for both.
    """
    first()
    second()
    turns = [(seconds_once(first), seconds_once(second)) for _ in range(repeats)]
    times = [statistics.median(column) for column in zip(*turns, strict=True)]
    return times[0], times[1], statistics.median(one / other for one, other in turns)


def seconds_once(run: Callable[[], None]) -> float:
    """Time of one call."""
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def count_operations(geometry: RelationGeometry, batch: int, dim: int) -> int:
    """Operations of a forward and backward pass, roles qkv, whose backward computes the rows again."""
    return 3 * 4 * 2 * batch * geometry.table_rows * dim * dim


def describe_run(script: str) -> dict[str, Any]:
    """The command, the date, the machine and the versions, for the report."""
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
    """Print the report, and write it with its raw figures where a folder is given."""
    print(text)
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.json").write_text(json.dumps(document, indent=2) + "\n")
        (folder / f"{name}.md").write_text(text)
