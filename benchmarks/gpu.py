"""Speed and memory of a Translution layer on a CUDA GPU in bf16, as fractions of the GPU's matmul rate.

The layer is compared with the rate of one large square torch.mm in the same run, and with the gathered
(published) implementation where that fits in memory. Nothing is printed unless the layer agrees with its
reference: in float64, and in bf16 about as closely as the reference itself.

usage: python benchmarks/gpu.py [--out FOLDER] [--repeats N] [--small]
"""

from __future__ import annotations

import argparse
import functools
import sys
from pathlib import Path
from typing import Any

import torch
from common import Case, check_parity, count_operations, describe_run, make, seconds, step, write_report

from translution.distributed.profiling import count_every_allocation, trace_allocations
from translution.models.ops import choose_products

CASES = {
    "ViT-B/16": Case({"grid": (14, 14), "class_token": True}, 768, 12, 32, False),
    "GPT-base-1024": Case({"length": 1024, "causal": True}, 768, 12, 4, False),
    "ViT-A/56": Case({"grid": (4, 4), "class_token": True}, 192, 3, 32, True),
    "ViT-B/56": Case({"grid": (4, 4), "class_token": True}, 768, 12, 8, True),
}
SMALL = {
    "small ViT": Case({"grid": (4, 4), "class_token": True}, 32, 2, 2, True),
    "small GPT": Case({"length": 24, "causal": True}, 32, 2, 2, True),
}


def wait(device: str) -> None:
    """Wait until the device has finished its work."""
    if device == "cuda":
        torch.cuda.synchronize()


def check_half_parity(device: str) -> float:
    """Return the layer's bf16 error as a fraction of the allowed error.

    The allowed error is twice that of the gathered implementation plus a few roundings.

    Raises:
        SystemExit: if the fraction exceeds 1.
    """
    worst = 0.0
    for layout in ({"grid": (4, 5), "class_token": True}, {"length": 16, "causal": True}):
        case = Case(layout, 64, 4, 4, True)
        ours, x = make(case, "batched", device=device, dtype=torch.bfloat16)
        found = []
        for name, dtype in (("batched", torch.bfloat16), ("gather", torch.bfloat16), ("gather", torch.float64)):
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


def peak_bytes(case: Case, implementation: str, device: str) -> int:
    """Return the peak bytes of a step beyond weights and input, including the gradients that it allocates."""
    layer, x = make(case, implementation, device=device, dtype=torch.bfloat16)
    step(layer, x)
    layer.zero_grad(set_to_none=True)
    x.grad = None
    if device == "cpu":
        begin, peak = trace_allocations(lambda: step(layer, x))
        return peak - begin
    wait(device)
    begin = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step(layer, x)
    wait(device)
    return torch.cuda.max_memory_allocated() - begin


def measure(name: str, case: Case, device: str, rate: float, repeats: int) -> dict[str, Any]:
    """Measure time, fraction of the matmul rate and memory of one case, and of the gathered layer if it fits."""
    fast, x = make(case, "batched", device=device, dtype=torch.bfloat16)
    operations = count_operations(fast.geometry, case.batch, case.dim)
    ours = seconds(functools.partial(step, fast, x), repeats, lambda: wait(device))
    result: dict[str, Any] = {
        "case": name,
        "batch": case.batch,
        "products": type(choose_products(x.device, x.dtype, case.dim, case.dim)).__name__,
        "seconds": ours,
        "operations": operations,
        "matmul_rate_share": operations / ours / rate,
    }
    del fast, x
    result["peak_bytes"] = peak_bytes(case, "batched", device)
    if case.gather:
        slow, x = make(case, "gather", device=device, dtype=torch.bfloat16)
        result["gather_seconds"] = seconds(functools.partial(step, slow, x), max(1, repeats // 3), lambda: wait(device))
        del slow, x
        result["gather_peak_bytes"] = peak_bytes(case, "gather", device)
        result["times_faster"] = result["gather_seconds"] / ours
        result["times_smaller"] = result["gather_peak_bytes"] / result["peak_bytes"]
    return result


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
        "| layer | batch | time | peak | gathered | peak | faster | smaller | of one large matmul's rate | products |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|---|",
    ]
    for row in document["results"]:
        cells = [row["case"], row["batch"], f"{row['seconds'] * 1e3:.2f} ms", f"{row['peak_bytes'] / 2**20:.1f} MiB"]
        if "gather_seconds" in row:
            cells += [f"{row['gather_seconds'] * 1e3:.2f} ms", f"{row['gather_peak_bytes'] / 2**20:.0f} MiB"]
            cells += [f"{row['times_faster']:.1f}×", f"{row['times_smaller']:.1f}×"]
        else:
            cells += ["", "", "", ""]
        cells += [f"{row['matmul_rate_share']:.1%}", row["products"]]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


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
    count_every_allocation()
    document = {
        **describe_run("gpu"),
        "device": torch.cuda.get_device_name() if device == "cuda" else "no GPU",
        "cuda": torch.version.cuda,
        "parity": check_parity("batched", device),
        "half_parity": check_half_parity(device),
        "matmul_size": 256 if arguments.small else 8192,
    }
    rate = matmul_rate(device, document["matmul_size"], arguments.repeats)
    document["matmul_flop_per_s"] = rate
    cases = SMALL if arguments.small else CASES
    document["results"] = [measure(name, case, device, rate, arguments.repeats) for name, case in cases.items()]
    write_report(arguments.out, "gpu", document, markdown(document))


if __name__ == "__main__":
    main()
