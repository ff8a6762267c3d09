"""Memory: what a context, products and collectives hold, and predicted next to measured memory of some plans.

Three figures are measured of each plan: what torch allocated, what it reserved from the driver, and what the driver
says is in use. Their differences are fragmentation, and the context with what NCCL holds.
"""

from __future__ import annotations

import json
import multiprocessing
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from translution.distributed import leave_process_group
from translution.planner import load_model, make_plan
from translution.planner.common import TRAINING_PHASES, Phase, TranslutionError, format_bytes
from translution.planner.config import TrainingSpec
from translution.planner.costs import count_parameters
from translution.planner.hardware import ClusterSpec
from translution.planner.plans import Plan

from .machine import Context, device_used_bytes, this_machine
from .rank import RankRun, run_plan

COUNTED_FROM = 3
"""Steps before this one, counted from 0, are slower: kernels load, and memory is measured."""

_OVERHEAD_SECONDS = 60.0


@dataclass(frozen=True)
class Case:
    """A plan to measure."""

    name: str
    model: str
    changes: dict[str, Any]
    offload: str = "none"
    micro_batch: int = 8
    steps: int = 8

    def plan(self, cluster: ClusterSpec, precision: str) -> Plan:
        """Return the plan for one rank, ZeRO-3."""
        values = {"precision": precision, "micro_batch": self.micro_batch, "data": "synthetic", "steps": self.steps}
        training = TrainingSpec.model_validate(values)
        return make_plan(load_model(self.model, **self.changes), cluster, training, stage=3, offload=self.offload)


_ALPHA: dict[str, Any] = {"operator": "alpha", "c1": 16, "c2": 16}
CASES = (
    Case("ViT-Small/16, 4 layers", "vit-small/16", {"depth": 4}),
    Case("ViT-Base/16, 1 layer", "vit-base/16", {"depth": 1}),
    Case("GPT-Small/1024, 1 layer", "gpt-small/1024", {"depth": 1}, micro_batch=2),
    Case("α-ViT-Base/16", "vit-base/16", _ALPHA),
    Case("ViT-Small/16, 4 layers, optimizer on the host", "vit-small/16", {"depth": 4}, "cpu-optimizer", steps=6),
    Case("ViT-Small/16, 4 layers, both on the host", "vit-small/16", {"depth": 4}, "cpu", steps=6),
)
_TINY: dict[str, Any] = {"depth": 1, "dim": 32, "heads": 2}
SMALL = (
    Case("tiny ViT", "vit-tiny/56", _TINY, micro_batch=2, steps=5),
    Case("tiny ViT, both on the host", "vit-tiny/56", _TINY, "cpu", micro_batch=2, steps=5),
)


def cases(context: Context) -> tuple[Case, ...]:
    """Return the plans to measure."""
    return SMALL if context.small else CASES


def precision(context: Context) -> str:
    """Return the precision of the plans."""
    return "bf16" if context.device == "cuda" else "fp32"


def measure_memory(context: Context) -> None:
    """Measure the overhead, then each plan; a plan that fails stops no other.

    Raises:
        SystemExit: if a plan failed.
    """
    _measure_overhead(context)
    cluster, failed, ratios = this_machine(context.device), [], []
    context.result.put(cluster=cluster.model_dump(exclude_none=True, mode="json"))
    for case in cases(context):
        row = measure_case(case, cluster, context)
        context.result.add("plans", row)
        context.result.note(json.dumps(row))
        if row["error"]:
            failed.append(case.name)
        elif row["allocated_bytes"]:
            ratios.append(row["predicted_allocated_bytes"] / row["allocated_bytes"])
        span = f", predicted / allocated {min(ratios):.3f} to {max(ratios):.3f}" if ratios else ""
        context.result.say(f"{len(context.result.data['plans']) - len(failed)} of {len(cases(context))} plans{span}")
    if failed:
        raise SystemExit(f"{', '.join(failed)}: failed")


def measure_case(case: Case, cluster: ClusterSpec, context: Context) -> dict[str, Any]:
    """Run one plan; return predicted and measured figures, or the error."""
    row: dict[str, Any] = {"name": case.name, "model": case.model, "offload": case.offload, "error": ""}
    try:
        plan = case.plan(cluster, precision(context))
    except TranslutionError as error:
        return row | {"error": str(error)}
    run = run_plan(plan, context)
    counted = run.step_seconds[COUNTED_FROM:]
    row |= {
        "micro_batch": case.micro_batch,
        "parameters": count_parameters(plan.model).total,
        "process_seconds": run.seconds,
        "first_step_seconds": run.first_step_seconds,
        "step_seconds": statistics.median(counted) if counted else None,
        "fastest_seconds": min(counted, default=None),
        "slowest_seconds": max(counted, default=None),
        "losses": run.losses,
        "error": run.error,
    }
    return row | _sizes(plan, run)


def _sizes(plan: Plan, run: RankRun) -> dict[str, Any]:
    """Return predicted and measured bytes; see `MemoryMeasurement` for the measured ones."""
    prediction, measured = plan.prediction, run.measurement
    peaks = [peak for phase in TRAINING_PHASES if (peak := prediction.peak(phase)) is not None]
    interval = prediction.device_interval_bytes
    found: dict[str, Any] = {
        "predicted_allocated_bytes": max(peak.allocated_bytes for peak in peaks),
        "predicted_reserved_bytes": max(peak.reserved_bytes for peak in peaks),
        "predicted_device_bytes": max(peak.bytes - peak.of("driver reserve") for peak in peaks),
        "predicted_interval_bytes": None if interval is None else list(interval),
        "predicted_host_bytes": prediction.host_bytes,
        "used_before_bytes": run.used_before_bytes,
    }
    if measured is None:
        return found
    phases = {
        phase: {"predicted_bytes": prediction.allocated_bytes_of(phase), "measured_bytes": size}
        for phase, size in measured.phase_peak_bytes.items()
    }
    phases[Phase.BETWEEN] = {
        "predicted_bytes": prediction.allocated_bytes_of(Phase.BETWEEN), "measured_bytes": measured.resident_bytes
    }  # fmt: skip
    used = measured.device_used_bytes
    return found | {
        "allocated_bytes": measured.peak_bytes,
        "reserved_bytes": measured.reserved_bytes,
        "device_used_bytes": used,
        "own_device_bytes": None if used is None else used - (run.used_before_bytes or 0),
        "process_peak_bytes": measured.process_peak_bytes,
        "entries_bytes": measured.entries_bytes,
        "host_entries_bytes": measured.host_entries_bytes,
        "phases": phases,
    }


_FRESH = """
import json, sys
sys.path.append(sys.argv[1])
from gpu_parts.memory import overhead_steps
overhead_steps(sys.argv[2], lambda row: print("row " + json.dumps(row), flush=True))
"""


def _overhead_rows(context: Context) -> tuple[list[dict[str, Any]], str]:
    """Return the rows of `overhead_steps` in a process that has used nothing yet, and its error."""
    if context.device == "cpu":
        queue = multiprocessing.get_context("fork").SimpleQueue()
        forked = multiprocessing.get_context("fork").Process(target=overhead_steps, args=("cpu", queue.put))
        forked.start()
        forked.join(_OVERHEAD_SECONDS)
        rows = []
        while not queue.empty():
            rows.append(queue.get())
        return rows, f"exit code {forked.exitcode}" if forked.exitcode else ""
    command = [sys.executable, "-c", _FRESH, str(context.script.parents[1] / "benchmarks"), context.device]
    done = subprocess.run(command, capture_output=True, text=True, timeout=_OVERHEAD_SECONDS, check=False)
    found = [json.loads(line.removeprefix("row ")) for line in done.stdout.splitlines() if line.startswith("row ")]
    lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
    return found, lines[-1][:300] if done.returncode else ""


def _measure_overhead(context: Context) -> None:
    """Measure in a fresh process what a context, the first products and a process group hold."""
    rows, error = _overhead_rows(context)
    context.result.put(overhead=rows, overhead_error=error)
    for row in rows:
        size = row["device_bytes"]
        context.result.note(f"{row['what']}: {'unknown' if size is None else format_bytes(size)} on the device")


def overhead_steps(device: str, on_row: Callable[[dict[str, Any]], None]) -> None:
    """Report what each first use adds: to the memory in use, to what torch reserved and to what it allocated.

    On a CPU the memory in use is the process's own.

    Args:
        device: "cuda" or "cpu".
        on_row: called with the bytes that each step added.
    """
    before = _in_use(device, context=False)
    import torch

    made: list[Any] = []

    def first_tensor() -> None:
        made.append(torch.zeros(1, device=device))

    def first_product() -> None:
        values = torch.ones(1024, 1024, device=device, dtype=torch.bfloat16)
        made.append(values @ values)

    def product_in_backward() -> None:
        values = torch.ones(1024, 1024, device=device, dtype=torch.bfloat16, requires_grad=True)
        (values @ values).sum().backward()

    def process_group() -> None:
        from translution.distributed.system import free_port

        torch.distributed.init_process_group(
            "nccl" if device == "cuda" else "gloo", init_method=f"tcp://127.0.0.1:{free_port()}", rank=0, world_size=1
        )

    def first_collective() -> None:
        torch.distributed.all_reduce(torch.ones(1024, device=device))

    steps = (first_tensor, first_product, product_in_backward, process_group, first_collective)
    held = (0, 0)
    for step in steps:
        step()
        if device == "cuda":
            torch.cuda.synchronize()
        after = _in_use(device, context=True)
        now = (torch.cuda.memory_reserved(), torch.cuda.memory_allocated()) if device == "cuda" else (0, 0)
        on_row(
            {
                "what": step.__name__.replace("_", " "),
                "device_bytes": None if before is None or after is None else after - before,
                "reserved_bytes": now[0] - held[0],
                "allocated_bytes": now[1] - held[1],
            }
        )
        before, held = after, now
    leave_process_group()


def _in_use(device: str, *, context: bool) -> int | None:
    """Return the bytes in use: on the card by all processes, or by this process.

    Args:
        device: "cuda" or "cpu".
        context: whether this process has a context, which it needs to ask the driver itself.
    """
    if device == "cpu":
        from pathlib import Path

        pages = Path("/proc/self/statm")
        return int(pages.read_text(encoding="ascii").split()[1]) * 4096 if pages.exists() else None
    used = device_used_bytes()
    if used is None and context:
        import torch

        free, total = torch.cuda.mem_get_info()
        used = total - free
    return used
