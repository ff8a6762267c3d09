"""Time and memory of every way to compute the operator, and of fused attention: what ``benchmarks/gpu.py`` measures."""

from __future__ import annotations

from .machine import Context

REPEATS = 7


def measure_operators(context: Context) -> None:
    """Measure the layers of ``benchmarks/gpu.py``; each is written as it comes.

    Raises:
        SystemExit: if the layer does not agree with its reference, or cannot be computed.
    """
    from gpu import measure_all

    repeats = 1 if context.small else REPEATS
    for document in measure_all(context.device, repeats, context.result.note, small=context.small):
        own = {name: value for name, value in document.items() if name not in ("command", "date", "machine")}
        context.result.put(**own)
        shares = [
            f"{row['case']} {row['seconds'] * 1e3:.3g} ms ({row['matmul_rate_share']:.1%} of the matmul rate)"
            for row in document["results"]
            if "matmul_rate_share" in row
        ]
        context.result.say("; ".join([f"matmul {document['matmul_flop_per_s'] / 1e12:.3g} TFLOP/s", *shares]))
    errors = [f"{row['case']}: {row['error']}" for row in context.result.data["results"] if "error" in row]
    if errors:
        raise SystemExit(errors[0])
