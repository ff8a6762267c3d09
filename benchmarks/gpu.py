"""Speed and memory of a Translution layer on a CUDA GPU in bf16, as fractions of the GPU's matmul rate.

Every way to compute the layer is measured, forward and backward apart: many relations in one grouped product, many
relations in separate products, one relation at a time, and, where it fits in memory, the gathered (published)
implementation. They are compared with attention that has the same projections, through torch's fused attention, and
with the rate of one large square torch.mm in the same run. Nothing is printed unless the layer agrees with its
reference: in float64, and in bf16 about as closely as the reference itself.

usage: python benchmarks/gpu.py [--out FOLDER] [--repeats N] [--small]
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from common import Case, check_parity, count_operations, describe_run, make, seconds, step, write_report
from gpu_networks import measure_networks, networks_table
from kernel_profile import kernel_rows, tuning_rows
from torch import nn

from translution.distributed.profiling import count_every_allocation, trace_allocations
from translution.models import SelfAttention, Translution
from translution.models.ops import SeparateProducts, choose_products
from translution.models.ops.fused import fused_problem

CASES = {
    "ViT-B/16": Case({"grid": (14, 14), "class_token": True}, 768, 12, 32, False),
    "GPT-base-1024": Case({"length": 1024, "causal": True}, 768, 12, 4, False),
    "α, ViT-B/16": Case({"grid": (14, 14), "class_token": True}, 768, 12, 32, False, alpha=True),
    "ViT-L/16": Case({"grid": (14, 14), "class_token": True}, 1024, 16, 16, False),
    "ViT-A/56": Case({"grid": (4, 4), "class_token": True}, 192, 3, 32, True),
    "ViT-B/56": Case({"grid": (4, 4), "class_token": True}, 768, 12, 8, True),
}
SMALL = {
    "small ViT": Case({"grid": (4, 4), "class_token": True}, 32, 2, 2, True),
    "small GPT": Case({"length": 24, "causal": True}, 32, 2, 2, True),
    "small α": Case({"grid": (4, 4), "class_token": True}, 32, 2, 2, False, alpha=True),
}
FUSED, CHOSEN, SEPARATE, SINGLE, GATHERED, ATTENTION = (
    "fused kernels",
    "many relations, chosen products",
    "many relations, separate products",
    "one relation at a time",
    "gathered",
    "fused attention",
)
"""Ways to compute a layer. A GPU uses the first if it has Triton and the second otherwise."""
Notice = Callable[[str], None]


def wait(device: str) -> None:
    """Wait until the device has finished its work."""
    if device == "cuda":
        torch.cuda.synchronize()


def check_half_parity(device: str, implementation: str) -> float:
    """Return the bf16 error of an implementation as a fraction of the allowed error.

    The allowed error is twice that of the gathered implementation plus a few roundings.

    Raises:
        SystemExit: if the fraction exceeds 1.
    """
    worst = 0.0
    for layout in ({"grid": (4, 5), "class_token": True}, {"length": 16, "causal": True}):
        case = Case(layout, 64, 4, 4, True)
        ours, x = make(case, implementation, device=device, dtype=torch.bfloat16)
        found = []
        for name, dtype in ((implementation, torch.bfloat16), ("gather", torch.bfloat16), ("gather", torch.float64)):
            layer, _ = make(case, name, device=device, dtype=dtype)
            layer.load_state_dict(ours.state_dict())
            own = x.detach().to(dtype).requires_grad_()
            out = layer(own)
            grads = torch.autograd.grad(out.sum(), [own, *layer.parameters()])
            found.append([tensor.detach().double() for tensor in (out, *grads)])
        for near, reference, truth in zip(*found, strict=True):
            floor = 16 * torch.finfo(torch.bfloat16).eps * (float(truth.abs().max()) + 1)
            error, allowed = (float((values - truth).abs().max()) for values in (near, reference))
            worst = max(worst, error / (2 * allowed + floor))
    if not worst <= 1:
        sys.exit(f"parity: the layer's bf16 error is {worst:.2f} times the allowed error: no timings are shown")
    return worst


def matmul_rate(device: str, size: int, repeats: int) -> float:
    """Return the FLOP/s of one product of two square bf16 matrices."""
    a, b = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
    out = torch.empty_like(a)
    return 2 * size**3 / seconds(lambda: torch.mm(a, b, out=out), repeats, lambda: wait(device))


def _make(case: Case, way: str, device: str) -> tuple[nn.Module, torch.Tensor]:
    """Return a bf16 layer that is computed in one of the ways, and an input (batch, tokens, dim)."""
    factory: dict[str, Any] = {"device": device, "dtype": torch.bfloat16}
    layer: nn.Module
    if way == ATTENTION:
        torch.manual_seed(0)
        layer = SelfAttention(case.dim, case.heads, **case.layout).to(**factory)
        tokens = layer.geometry.tokens
        return layer, torch.randn(case.batch, tokens, case.dim).to(**factory).requires_grad_()
    implementation = {FUSED: "fused", GATHERED: "gather", SINGLE: "grouped"}.get(way, "batched")
    own, x = make(case, implementation, **factory)
    own.tables.products = SeparateProducts() if way == SEPARATE else None
    return own, x


def _peak_bytes(layer: nn.Module, x: torch.Tensor) -> int:
    """Return the peak bytes of a step beyond weights and input, including the gradients that it allocates."""
    layer.zero_grad(set_to_none=True)
    x.grad = None
    if x.device.type == "cpu":
        begin, peak = trace_allocations(lambda: step(layer, x))
        return peak - begin
    wait("cuda")
    begin = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step(layer, x)
    wait("cuda")
    return torch.cuda.max_memory_allocated() - begin


def _passes(layer: nn.Module, x: torch.Tensor, repeats: int) -> tuple[float, float]:
    """Return the median seconds of forward and of backward, after one step that is not counted."""
    device, times = x.device.type, []
    step(layer, x)
    for _ in range(repeats):
        layer.zero_grad(set_to_none=True)
        x.grad = None
        wait(device)
        marks = [time.perf_counter()]
        out = layer(x).sum()
        wait(device)
        marks.append(time.perf_counter())
        out.backward()
        wait(device)
        marks.append(time.perf_counter())
        times.append((marks[1] - marks[0], marks[2] - marks[1]))
    forward, backward = (statistics.median(column) for column in zip(*times, strict=True))
    return forward, backward


def measure_way(case: Case, way: str, device: str, repeats: int) -> dict[str, Any]:
    """Return seconds of a step, of forward and of backward, and the peak bytes of one way; or the error."""
    try:
        layer, x = _make(case, way, device)
        whole = seconds(functools.partial(step, layer, x), repeats, lambda: wait(device))
        forward, backward = _passes(layer, x, repeats)
        sizes: dict[str, Any] = {"peak_bytes": _peak_bytes(layer, x)}
        if way == FUSED and device == "cuda":
            sizes["kernels"] = kernel_rows(functools.partial(step, layer, x))
    except (RuntimeError, ValueError) as error:  # Out of memory, or a product that this version does not support.
        return {"way": way, "error": " ".join(str(error).split())[:300]}
    return {"way": way, "seconds": whole, "forward_seconds": forward, "backward_seconds": backward, **sizes}


def ways_of(case: Case, device: str) -> tuple[str, ...]:
    """Return the ways to compute a case on a device; the first is the one that a layer takes there by itself."""
    fused = fused_problem(torch.device(device), torch.bfloat16, (case.dim, case.dim), case.heads) is None
    slow = () if case.alpha else (SINGLE, *([GATHERED] if case.gather else []))
    return (*([FUSED] if fused else []), CHOSEN, ATTENTION, SEPARATE, *slow)


def measure(name: str, case: Case, device: str, rate: float, repeats: int, notice: Notice) -> Iterator[dict[str, Any]]:
    """Measure every way to compute one case; yield what is known after each of them.

    The first way gives the case's time, fraction of the matmul rate and memory.
    """
    ways: list[dict[str, Any]] = []
    for way in ways_of(case, device):
        count = max(1, repeats // 3) if way in (GATHERED, SINGLE) else repeats
        ways.append(measure_way(case, way, device, count))
        notice(f"{name}, { ({key: value for key, value in ways[-1].items() if key != 'kernels'}) }")
        yield _result(name, case, device, rate, ways)


def _result(name: str, case: Case, device: str, rate: float, ways: list[dict[str, Any]]) -> dict[str, Any]:
    found = {row["way"]: row for row in ways}
    chosen = ways[0]
    if "error" in chosen:
        return {"case": name, "batch": case.batch, "ways": list(ways), "error": chosen["error"]}
    probe = torch.empty(0, device=device)
    result: dict[str, Any] = {
        "case": name,
        "batch": case.batch,
        "products": type(choose_products(probe.device, torch.bfloat16, case.dim, case.dim)).__name__,
        "seconds": chosen["seconds"],
        "peak_bytes": chosen["peak_bytes"],
        "ways": list(ways),
    }
    if "seconds" in found.get(ATTENTION, {}):
        result["times_attention"] = chosen["seconds"] / found[ATTENTION]["seconds"]
    if not case.alpha:
        result["operations"] = count_operations(_geometry(case), case.batch, case.dim)
        result["matmul_rate_share"] = result["operations"] / chosen["seconds"] / rate
    gathered = found.get(GATHERED, {})
    if "seconds" in gathered:
        result["gather_seconds"], result["gather_peak_bytes"] = gathered["seconds"], gathered["peak_bytes"]
        result["times_faster"] = gathered["seconds"] / chosen["seconds"]
        result["times_smaller"] = gathered["peak_bytes"] / chosen["peak_bytes"]
    return result


def _geometry(case: Case) -> Any:
    with torch.device("meta"):
        return Translution(case.dim, case.heads, **case.layout).geometry


def _ways_table(document: dict[str, Any]) -> list[str]:
    lines = ["", "| layer | way | forward | backward | peak |", "|---|---|--:|--:|--:|"]
    for row in document["results"]:
        for way in row["ways"]:
            if "error" in way:
                lines.append(f"| {row['case']} | {way['way']} | {way['error'].replace('|', '/')} | | |")
                continue
            passes = f"{way['forward_seconds'] * 1e3:.3f} ms | {way['backward_seconds'] * 1e3:.3f} ms"
            lines.append(f"| {row['case']} | {way['way']} | {passes} | {way['peak_bytes'] / 2**20:.1f} MiB |")
    return lines


def markdown(document: dict[str, Any]) -> str:
    """Return the report as Markdown."""
    machine = document["machine"]
    lines = [
        "# Translution layer, forward and backward, bf16, roles qkv",
        "",
        f"`{document['command']}` on {document['date']}: {document['device']}, {machine['processor']}, "
        f"torch {machine['torch']}, Python {machine['python']}, translution-scale {machine['translution']}.",
        f"Parity with the gathered reference in float64: {document['parity']:.1e}; the error in bf16 is "
        f"{document['half_parity']:.0%} of the allowed error. One product of two {document['matmul_size']}² matrices: "
        f"{document['matmul_flop_per_s'] / 1e12:.2f} TFLOP/s.",
        "",
        "| layer | batch | time | peak | gathered | peak | faster | smaller "
        "| of one large matmul's rate | attention's time | products |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|---|",
    ]
    for row in document["results"]:
        if "error" in row:
            continue
        cells = [row["case"], row["batch"], f"{row['seconds'] * 1e3:.2f} ms", f"{row['peak_bytes'] / 2**20:.1f} MiB"]
        if "gather_seconds" in row:
            cells += [f"{row['gather_seconds'] * 1e3:.2f} ms", f"{row['gather_peak_bytes'] / 2**20:.0f} MiB"]
            cells += [f"{row['times_faster']:.1f}×", f"{row['times_smaller']:.1f}×"]
        else:
            cells += ["", "", "", ""]
        share, times = row.get("matmul_rate_share"), row.get("times_attention")
        cells += ["" if share is None else f"{share:.1%}", "" if times is None else f"{times:.1f}×", row["products"]]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines + _ways_table(document) + networks_table(document["networks"])) + "\n"


def measure_all(device: str, repeats: int, notice: Notice, *, small: bool) -> Iterator[dict[str, Any]]:
    """Check parity and measure every case; yield the document again with each way to compute it.

    Args:
        device: "cuda" or "cpu".
        repeats: number of counted runs of each way.
        notice: called with a line as each way has been measured.
        small: tiny layers.

    Raises:
        SystemExit: if the layer does not agree with its reference.
    """
    if device == "cpu":
        count_every_allocation()
    fused = fused_problem(torch.device(device), torch.bfloat16, (64, 64), 4) is None
    document: dict[str, Any] = {
        **describe_run("gpu"),
        "device": torch.cuda.get_device_name() if device == "cuda" else "no GPU",
        "cuda": torch.version.cuda,
        "parity": check_parity("batched", device),
        "half_parity": max(check_half_parity(device, way) for way in ("batched", *(["fused"] if fused else []))),
        "matmul_size": 256 if small else 8192,
    }
    rate = matmul_rate(device, document["matmul_size"], repeats)
    document |= {"matmul_flop_per_s": rate, "results": []}
    yield document
    for name, case in (SMALL if small else CASES).items():
        done = list(document["results"])
        for result in measure(name, case, device, rate, repeats, notice):
            document |= {"results": [*done, result], "tuning": tuning_rows()}
            yield document
    document["networks"] = []
    for row in measure_networks(device, max(1, repeats // 2), notice, small=small):
        document["networks"].append(row)
        yield document


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="folder for gpu.json and gpu.md")
    parser.add_argument("--repeats", type=int, default=10, help="number of counted runs of each case")
    parser.add_argument("--small", action="store_true", help="tiny layers; runs on a CPU if there is no GPU")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not arguments.small:
        print(
            "gpu.py: error: no CUDA GPU on this machine; --small runs the same measurements on tiny layers",
            file=sys.stderr,
        )
        sys.exit(2)
    *_, document = measure_all(device, arguments.repeats, _print_row, small=arguments.small)
    write_report(arguments.out, "gpu", document, markdown(document))


def _print_row(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
