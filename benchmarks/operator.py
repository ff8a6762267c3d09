"""Speed and memory of the grouped operator, as ratios within one run.

The operator is compared with the gathered (published) implementation, and with the rate that plain
``torch.mm`` reaches on the same matrix shapes. Nothing is printed unless the operator agrees with its
reference.

usage: python benchmarks/operator.py [--out FOLDER] [--repeats N] [--case NAME ...]
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import Case, alternate, check_parity, count_operations, describe_run, make, step, write_report
from torch import nn

from translution.distributed.profiling import count_every_allocation, trace_allocations
from translution.models import AlphaTranslution, SelfAttention, Translution
from translution.planner.common import usable_cores
from translution.planner.config import RelationGeometry

CASES = {
    "ViT-A/56": Case({"grid": (4, 4), "class_token": True}, 192, 3, 32, True),
    "ViT-A/32": Case({"grid": (7, 7), "class_token": True}, 192, 3, 32, False),
    "ViT-C/16": Case({"grid": (14, 14), "class_token": True}, 384, 6, 4, False),
    "GPT-A-256": Case({"length": 256, "causal": True}, 192, 3, 4, False),
}


def peak_bytes(layer: Translution, x: torch.Tensor) -> int:
    """Return the peak bytes of a step beyond weights and input, including the gradients that it allocates."""
    layer.zero_grad(set_to_none=True)
    x.grad = None
    begin, peak = trace_allocations(lambda: step(layer, x))
    return peak - begin


def plain_products(geometry: RelationGeometry, batch: int, dim: int) -> Callable[[], None]:
    """Return a function that runs the matrix products of forward and backward with torch.mm, one by one.

    The shapes are those of the operator: for each relation and role, rows × matrix in forward and again
    in backward, the rows' gradient and the matrix's gradient. Every relation has its own matrix, and
    gradients are newly allocated, as in any implementation; the rows are contiguous and reused.
    """
    tables = [torch.randn(geometry.relations, dim, dim) for _ in range(3)]
    max_rows = batch * geometry.patches
    rows, out = torch.randn(max_rows, dim), torch.empty(max_rows, dim)
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
    products = torch.no_grad()(plain_products(layer.geometry, case.batch, case.dim))
    plain, grouped, share = alternate(products, functools.partial(step, layer, x), repeats)
    result: dict[str, Any] = {
        "case": name,
        "batch": case.batch,
        "grouped_seconds": grouped,
        "grouped_peak_bytes": peak_bytes(layer, x),
        "operations": operations,
        "matmul_seconds": plain,
        "matmul_flop_per_s": operations / plain,
        "matmul_rate_share": share,
    }
    if case.gather:
        slow, x = make(case, "gather")
        turn = functools.partial(step, slow, x), functools.partial(step, layer, x)
        result["gather_seconds"], _, result["times_faster"] = alternate(*turn, max(1, repeats // 2))
        result["gather_peak_bytes"] = peak_bytes(slow, x)
        result["times_smaller"] = result["gather_peak_bytes"] / result["grouped_peak_bytes"]
    return result


class ProjectedAttention(nn.Module):
    """Plain attention with the plain projections that α-Translution has in addition to its tables."""

    def __init__(self, dim: int, heads: int, low: int, layout: dict[str, Any]) -> None:
        super().__init__()
        self.attention = SelfAttention(dim, heads, **layout)
        self.down = nn.ModuleList(nn.Linear(dim, heads * low, bias=False) for _ in range(3))
        self.up = nn.Linear(heads * low, dim, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        low = self.down[0](x) + self.down[1](x) + self.down[2](x)
        result: torch.Tensor = self.attention(x) + self.up(low)
        return result


def measure_alpha(repeats: int) -> dict[str, Any]:
    """Compare α-Translution of ViT-B/16 (c1 = c2 = 16) with attention that has the same projections."""
    dim, heads, low, batch = 768, 12, 16, 4
    layout: dict[str, Any] = {"grid": (14, 14), "class_token": True}
    torch.manual_seed(0)
    alpha = AlphaTranslution(dim, heads, c1=low, c2=low, **layout)
    plain = ProjectedAttention(dim, heads, low, layout)
    x = torch.randn(batch, alpha.geometry.tokens, dim, requires_grad=True)
    relative = count_operations(alpha.geometry, batch, heads * low)
    weights = sum(parameter.numel() for parameter in plain.parameters() if parameter.ndim == 2)
    # Each projection, and each of attention's two products, counts three times: forward and both gradients.
    other = 3 * 2 * batch * 197 * weights + 3 * 2 * 2 * batch * 197**2 * dim
    ours, theirs, ratio = alternate(functools.partial(step, alpha, x), functools.partial(step, plain, x), repeats)
    return {
        "batch": batch,
        "alpha_seconds": ours,
        "plain_seconds": theirs,
        "time_ratio": ratio,
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="folder for operator.json and operator.md")
    parser.add_argument("--repeats", type=int, default=7, help="number of counted runs of each case")
    parser.add_argument("--case", action="append", choices=list(CASES), help="only these cases")
    arguments = parser.parse_args()
    count_every_allocation()
    torch.set_num_threads(usable_cores())
    document: dict[str, Any] = {
        **describe_run("operator"),
        "parity": check_parity(),
        "results": [measure(name, CASES[name], arguments.repeats) for name in arguments.case or CASES],
    }
    if not arguments.case:
        document["alpha"] = measure_alpha(arguments.repeats)
    write_report(arguments.out, "operator", document, markdown(document))


if __name__ == "__main__":
    main()
