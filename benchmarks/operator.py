"""Speed and memory of the grouped operator, as ratios within one run.

Against the gathered (published) implementation, and against the rate that plain ``torch.mm`` reaches
on the same multiset of matrix shapes. Nothing is printed unless the operator agrees with its
reference first.

usage: python benchmarks/operator.py [--out FOLDER] [--repeats N] [--case NAME ...]
"""

from __future__ import annotations

import argparse
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

from translution.distributed.measure import count_every_allocation, trace_allocations
from translution.models import AlphaTranslution, SelfAttention, Translution
from translution.planner.cluster import usable_cores
from translution.planner.relations import RelationGeometry

TOLERANCE = 1e-10


class Case(NamedTuple):
    """One layer of a model of the paper, and whether the gathered way fits in memory at its batch."""

    place: dict[str, Any]
    dim: int
    heads: int
    batch: int
    gather: bool


CASES = {
    "ViT-A/56": Case({"grid": (4, 4), "class_token": True}, 192, 3, 32, True),
    "ViT-A/32": Case({"grid": (7, 7), "class_token": True}, 192, 3, 32, False),
    "ViT-C/16": Case({"grid": (14, 14), "class_token": True}, 384, 6, 4, False),
    "GPT-A-256": Case({"length": 256, "causal": True}, 192, 3, 4, False),
}


def make(case: Case, implementation: str = "grouped", **changes: Any) -> tuple[Translution, torch.Tensor]:
    torch.manual_seed(0)
    layer = Translution(case.dim, case.heads, **case.place, implementation=implementation, **changes)
    return layer, torch.randn(case.batch, layer.geometry.tokens, case.dim, requires_grad=True)


def step(layer: nn.Module, x: torch.Tensor) -> None:
    """Forward and backward, gradients made anew as in training."""
    layer.zero_grad(set_to_none=True)
    x.grad = None
    layer(x).sum().backward()


def check_parity() -> float:
    """Largest difference in float64 of output and gradients, grouped against gathered, in each geometry.

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
        for implementation in ("grouped", "gather"):
            layer, x = make(case, implementation)
            layer, x = layer.double(), x.detach().double().requires_grad_()
            out = layer(x)
            grads = torch.autograd.grad(out, [x, *layer.parameters()], torch.linspace(-1, 1, out.numel()).view_as(out))
            results.append([out, *grads])
        worst = max(worst, *(float((a - b).detach().abs().max()) for a, b in zip(*results, strict=True)))
    if worst > TOLERANCE:
        sys.exit(
            f"parity: grouped and gathered differ by {worst:.1e} in float64, above {TOLERANCE:.0e}: no speed is shown"
        )
    return worst


def seconds(run: Callable[[], None], repeats: int) -> float:
    """Median time of a call, after one that is not counted."""
    run()
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        run()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def peak_bytes(layer: Translution, x: torch.Tensor) -> int:
    """Highest sum of allocations in a step beyond weights and input; the gradients it makes count."""
    layer.zero_grad(set_to_none=True)
    x.grad = None
    begin, peak = trace_allocations(lambda: step(layer, x))
    return peak - begin


def count_operations(geometry: RelationGeometry, batch: int, dim: int) -> int:
    """Operations of a forward and backward pass, roles qkv, whose backward computes the rows again."""
    return 3 * 4 * 2 * batch * geometry.table_rows * dim * dim


def plain_products(geometry: RelationGeometry, batch: int, dim: int) -> Callable[[], None]:
    """The matrix products of a forward and backward pass by torch.mm, one after the other.

    The same multiset of shapes: per relation and role, rows × matrix forward and again in backward,
    the rows' gradient and the matrix's gradient. As in any implementation, every relation has its own
    matrix in memory and gradients are made anew; the rows are ready, contiguous and reused.
    """
    tables = [torch.randn(geometry.relations, dim, dim) for _ in range(3)]
    most = batch * geometry.patches
    rows, out = torch.randn(most, dim), torch.empty(most, dim)
    sizes = [
        (role, relation, batch * block.size)
        for relation in range(geometry.relations)
        for pairs in [geometry.pairs(relation)]
        for role, block in enumerate((pairs.query, pairs.key, pairs.key))
    ]

    def run() -> None:
        for role, relation, size in sizes:
            torch.mm(rows[:size], tables[role][relation], out=out[:size])
        grads = [torch.empty_like(table) for table in tables]
        for role, relation, size in sizes:
            matrix = tables[role][relation]
            torch.mm(rows[:size], matrix, out=out[:size])
            torch.mm(rows[:size], matrix, out=out[:size])
            torch.mm(rows[:size].t(), out[:size], out=grads[role][relation])

    return run


def measure(name: str, case: Case, repeats: int) -> dict[str, Any]:
    layer, x = make(case)
    operations = count_operations(layer.geometry, case.batch, case.dim)
    with torch.no_grad():
        plain = seconds(plain_products(layer.geometry, case.batch, case.dim), repeats)
    grouped = seconds(lambda: step(layer, x), repeats)
    result: dict[str, Any] = {
        "case": name,
        "batch": case.batch,
        "grouped_seconds": grouped,
        "grouped_peak_bytes": peak_bytes(layer, x),
        "operations": operations,
        "matmul_seconds": plain,
        "matmul_flop_per_s": operations / plain,
        "matmul_rate_share": plain / grouped,
    }
    if case.gather:
        slow, x = make(case, "gather")
        result["gather_seconds"] = seconds(lambda: step(slow, x), max(1, repeats // 3))
        result["gather_peak_bytes"] = peak_bytes(slow, x)
        result["times_faster"] = result["gather_seconds"] / grouped
        result["times_smaller"] = result["gather_peak_bytes"] / result["grouped_peak_bytes"]
    return result


class ProjectedAttention(nn.Module):
    """Plain attention with the plain projections that α-Translution has beside its tables."""

    def __init__(self, dim: int, heads: int, low: int, place: dict[str, Any]) -> None:
        super().__init__()
        self.attention = SelfAttention(dim, heads, **place)
        self.down = nn.ModuleList(nn.Linear(dim, heads * low, bias=False) for _ in range(3))
        self.up = nn.Linear(heads * low, dim, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        low = self.down[0](x) + self.down[1](x) + self.down[2](x)
        result: torch.Tensor = self.attention(x) + self.up(low)
        return result


def measure_alpha(repeats: int) -> dict[str, Any]:
    """α-Translution of ViT-B/16 (c1 = c2 = 16) against attention with the same projections."""
    dim, heads, low, batch = 768, 12, 16, 4
    place: dict[str, Any] = {"grid": (14, 14), "class_token": True}
    torch.manual_seed(0)
    alpha = AlphaTranslution(dim, heads, c1=low, c2=low, **place)
    plain = ProjectedAttention(dim, heads, low, place)
    x = torch.randn(batch, alpha.geometry.tokens, dim, requires_grad=True)
    relative = count_operations(alpha.geometry, batch, heads * low)
    weights = sum(parameter.numel() for parameter in plain.parameters() if parameter.ndim == 2)
    # Every projection three times over (forward, both gradients); attention's two products likewise.
    other = 3 * 2 * batch * 197 * weights + 3 * 2 * 2 * batch * 197**2 * dim
    times = {name: seconds(lambda m=layer: step(m, x), repeats) for name, layer in (("alpha", alpha), ("plain", plain))}
    return {
        "batch": batch,
        "alpha_seconds": times["alpha"],
        "plain_seconds": times["plain"],
        "time_ratio": times["alpha"] / times["plain"],
        "operations_ratio": (other + relative) / other,
    }


def markdown(document: dict[str, Any]) -> str:
    machine = document["machine"]
    lines = [
        "# Grouped Translution layer, forward and backward, fp32, roles qkv",
        "",
        f"`{document['command']}` on {document['date']}: {machine['processor']}, {machine['cores']} cores, "
        f"torch {machine['torch']}, Python {machine['python']}, translution-scale {machine['translution']}.",
        f"Parity with the gathered reference in float64: {document['parity']:.1e}.",
        "",
        "| layer | batch | grouped | peak | gathered | peak | faster | smaller | of plain matmul's rate |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in document["results"]:
        cells = [
            row["case"],
            row["batch"],
            f"{row['grouped_seconds']:.3f} s",
            f"{row['grouped_peak_bytes'] / 2**20:.1f} MiB",
        ]
        if "gather_seconds" in row:
            cells += [f"{row['gather_seconds']:.2f} s", f"{row['gather_peak_bytes'] / 2**20:.0f} MiB"]
            cells += [f"{row['times_faster']:.0f}×", f"{row['times_smaller']:.0f}×"]
        else:
            cells += ["", "", "", ""]
        cells.append(f"{row['matmul_rate_share']:.0%}")
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    if "alpha" in document:
        alpha = document["alpha"]
        lines += [
            "",
            f"α-Translution of ViT-B/16 (c1 = c2 = 16), batch {alpha['batch']}: {alpha['alpha_seconds']:.2f} s, "
            f"{alpha['time_ratio']:.1f}× attention with the same projections ({alpha['plain_seconds']:.2f} s); its "
            f"tables make it {alpha['operations_ratio']:.1f}× the operations.",
        ]
    return "\n".join(lines) + "\n"


def processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="folder for operator.json and operator.md")
    parser.add_argument("--repeats", type=int, default=7, help="counted runs of each case")
    parser.add_argument("--case", action="append", choices=list(CASES), help="only these cases")
    arguments = parser.parse_args()
    count_every_allocation()
    torch.set_num_threads(usable_cores())
    document = {
        "command": " ".join(["python", "benchmarks/operator.py", *sys.argv[1:]]),
        "date": datetime.date.today().isoformat(),
        "machine": {
            "processor": processor(),
            "cores": usable_cores(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "translution": importlib.metadata.version("translution-scale"),
        },
        "parity": check_parity(),
        "results": [measure(name, CASES[name], arguments.repeats) for name in arguments.case or CASES],
    }
    if not arguments.case:
        document["alpha"] = measure_alpha(arguments.repeats)
    print(markdown(document))
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / "operator.json").write_text(json.dumps(document, indent=2) + "\n")
        (arguments.out / "operator.md").write_text(markdown(document))


if __name__ == "__main__":
    main()
