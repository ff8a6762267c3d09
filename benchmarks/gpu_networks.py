"""A block and a network of two layers on a GPU: forward and backward of Translution, α-Translution and attention."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from common import seconds
from torch import Tensor, nn

from translution.models import build
from translution.planner import load_model
from translution.planner.config import PatchSpec

WAYS = (
    ("translution", "auto"),
    ("translution", "batched"),
    ("alpha", "auto"),
    ("attention", "auto"),
)
"""Operators, and the implementation of each; a GPU's own choice is "auto"."""
BATCH, SMALL_BATCH = 32, 2


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _step(module: nn.Module, x: Tensor) -> None:
    module.zero_grad(set_to_none=True)
    module(x).float().sum().backward()


def _modules(
    operator: str, implementation: str, device: str, *, small: bool
) -> Iterator[tuple[str, nn.Module, Tensor]]:
    """Yield the name, the module and the input of the block and of the network."""
    changes: dict[str, Any] = {"depth": 2, "operator": operator}
    changes |= {"dim": 32, "heads": 2} if small else {}
    spec = load_model("vit-tiny/56" if small else "vit-base/16", **changes)
    assert isinstance(spec, PatchSpec)
    batch = SMALL_BATCH if small else BATCH
    torch.manual_seed(0)
    with torch.device(device):  # Billions of parameters take long to draw on a CPU.
        network = build(spec, implementation=implementation).bfloat16()
        tokens = torch.randn(batch, spec.tokens, spec.dim).bfloat16().requires_grad_()
        images = torch.randn(batch, *spec.sample_shape).bfloat16()
    yield f"block of {spec.name}", network.blocks[0], tokens
    yield f"{spec.name}, 2 layers", network, images


def measure_networks(
    device: str, repeats: int, notice: Callable[[str], None], *, small: bool
) -> Iterator[dict[str, Any]]:
    """Yield a row with the seconds of forward and backward of each module and operator.

    Args:
        device: "cuda" or "cpu".
        repeats: number of counted runs.
        notice: called with a line for each row.
        small: tiny modules.
    """
    for operator, implementation in WAYS:
        row: dict[str, Any] = {"operator": operator, "implementation": implementation}
        try:
            for name, module, x in _modules(operator, implementation, device, small=small):
                own = row | {"module": name, "batch": len(x)}
                time = seconds(functools.partial(_step, module, x), repeats, functools.partial(_wait, device))
                notice(f"{name}, {operator} ({implementation}): {time * 1e3:.2f} ms")
                yield own | {"seconds": time}
        except RuntimeError as error:  # Out of memory.
            yield row | {"error": " ".join(str(error).split())[:300]}


def networks_table(rows: list[dict[str, Any]]) -> list[str]:
    """Return the rows as lines of a Markdown table."""
    lines = ["", "| module | batch | operator | implementation | forward and backward |", "|---|--:|---|---|--:|"]
    for row in rows:
        time = f"{row['seconds'] * 1e3:.2f} ms" if "seconds" in row else row["error"].replace("|", "/")
        cells = (row.get("module", ""), row.get("batch", ""), row["operator"], row["implementation"], time)
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return lines
