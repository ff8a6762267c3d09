"""Compare the planner's predictions with measured runs, and list the predictions that are off.

python benchmarks/accuracy.py --out reports             # everything, about half an hour on 2 cores
python benchmarks/accuracy.py --only counts passes      # without runs of several ranks
python benchmarks/accuracy.py --measured reports/accuracy.json --out reports   # new predictions, recorded measurements
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from common import describe_run, write_report

from translution.distributed.profiling import count_every_allocation, measure_passes
from translution.distributed.verification import few_steps, measure_plan, predict_rehearsal, read_rehearsal
from translution.models import build
from translution.planner.common import Phase, Tier, format_bytes
from translution.planner.config import ModelSpec, RunConfig, TrainingSpec, parse_model_spec, preset
from translution.planner.costs import count_parameters
from translution.planner.hardware import load_cluster, local_cpu_cluster
from translution.planner.memory import MemoryEstimate, estimate_memory
from translution.planner.plans import Plan, choose_tile, choose_zero, load_plan, make_plan
from translution.planner.simulator.network import MICRO_BATCHES, DtypeSizes, replay
from translution.reports.inputs import (
    PROCESS_PREFIX,
    RESIDENT,
    SAVED,
    compare_run,
    current_label,
    predict_rank,
    predicted_and_measured,
)

SIZES: dict[str, Any] = {"dim": 96, "depth": 3, "heads": 3}
VIT: dict[str, Any] = {"family": "vit", "image": [64, 48], "patch": 8, "channels": 3, "classes": 100} | SIZES
GPT: dict[str, Any] = {"family": "gpt", "context": 64, "vocabulary": 500} | SIZES
LOW = {"operator": "alpha", "c1": 8, "c2": 4}
OPERATORS: list[dict[str, Any]] = [
    {"operator": "translution"},
    {"operator": "translution", "roles": "kv"},
    {"operator": "translution", "roles": "q"},
    {"operator": "translution", "window": 2},
    {"operator": "translution", "relative_layers": "first:1", "head_dim": 32},
    {"operator": "translution", "checkpointing": "block"},
    {"operator": "translution", "dropout": 0.1},
    LOW,
    LOW | {"roles": "v"},
    LOW | {"checkpointing": "block"},
    {"operator": "attention"},
    {"operator": "attention", "rotary": True},
    {"operator": "attention", "checkpointing": "block"},
    {"operator": "bias"},
    {"operator": "shaw"},
    {"operator": "absolute"},
]
LARGE: dict[str, Any] = {"family": "vit", "image": 16, "patch": 4, "channels": 1, "classes": 10}
LARGE |= {"dim": 256, "depth": 3, "heads": 4}
TILE = 16
"""Relations per tile: a rank's partition of a tile then has the 1 MiB that storage on NVMe requires. With much larger
tiles, at stages 1 and 2, the rank in whose partition one ends would hold much more memory than the other."""
RUNS: dict[str, dict[str, Any]] = {
    "ZeRO-0, fp32": {"stage": 0},
    "ZeRO-0, bf16": {"stage": 0, "precision": "bf16"},
    "ZeRO-1, fp32": {"stage": 1},
    "ZeRO-1, bf16": {"stage": 1, "precision": "bf16"},
    "ZeRO-2, fp32": {"stage": 2},
    "ZeRO-2, bf16, two micro-batches": {"stage": 2, "precision": "bf16", "accumulation": 2},
    "ZeRO-3, fp32": {"stage": 3},
    "ZeRO-3, bf16": {"stage": 3, "precision": "bf16"},
    "ZeRO-3, bf16, optimizer on the host": {"stage": 3, "precision": "bf16", "offload": "cpu-optimizer"},
    "ZeRO-3, bf16, both on the host": {"stage": 3, "precision": "bf16", "offload": "cpu"},
    "ZeRO-3, bf16, optimizer on NVMe": {"stage": 3, "precision": "bf16", "offload": "nvme-optimizer"},
    "ZeRO-3, bf16, both on NVMe": {"stage": 3, "precision": "bf16", "offload": "nvme"},
}
PRESETS = [f"vit-{size}/{patch}" for size in ("tiny", "mini", "small", "base", "large") for patch in (56, 32, 16)]
PRESETS += [f"gpt-{size}/{context}" for size in ("tiny", "mini", "small", "base", "large") for context in (160, 1024)]
PRESET_OPERATORS: list[dict[str, Any]] = [
    {"operator": "translution", "roles": "qkv"}, {"operator": "translution", "roles": "kv"},
    {"operator": "alpha", "c1": 16, "c2": 8}, {"operator": "alpha", "roles": "k"},
    {"operator": "translution", "relative_layers": "every:2"}, {"operator": "attention"},
    {"operator": "bias"}, {"operator": "shaw"}, {"operator": "absolute"},
]  # fmt: skip
SECTIONS = ("counts", "passes", "ranks", "times")


def _with(base: dict[str, Any], changes: dict[str, Any]) -> ModelSpec:
    return parse_model_spec(base | changes)


def count_rows() -> list[dict[str, Any]]:
    """Compare predicted parameter counts of the presets with networks on the meta device."""
    rows = []
    for name, changes in product(PRESETS, PRESET_OPERATORS):
        spec = parse_model_spec(preset(name).model_dump() | changes)
        with torch.device("meta"):
            built = sum(parameter.numel() for parameter in build(spec).parameters())
        predicted = count_parameters(spec).total
        rows.append({"what": f"{name}, {changes}", "predicted": predicted, "measured": built})
    return rows


def time_rows() -> list[dict[str, Any]]:
    """Measure the CPU seconds of an estimate of each preset on 512 ranks, the minimum of five."""
    rows, cluster = [], load_cluster("64x8xH100")
    for name in PRESETS:
        spec = preset(name)
        tile = choose_tile(spec, cluster.world_size)
        zero = choose_zero(spec, tile, 3, cluster.world_size)
        seconds = []
        for micro_batch in range(1, 6):  # A different one each time, so that no cached result is reused.
            training = TrainingSpec(precision="bf16", micro_batch=micro_batch, data="synthetic")
            begin = time.process_time()
            estimate_memory(RunConfig(spec, cluster, training, zero, tile))
            seconds.append(time.process_time() - begin)
        rows.append({"what": name, "seconds": min(seconds)})
    return rows


def pass_rows() -> list[dict[str, Any]]:
    """Compare predicted peaks of forward and backward in one process with those of torch's allocator."""
    torch.set_num_threads(1)
    packs = bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    rows = []
    for base, changes, dtype in product((VIT, GPT), OPERATORS, (torch.float32, torch.bfloat16)):
        spec = _with(base, changes)
        peaks = replay(spec, 16, DtypeSizes.of(dtype.itemsize, "cpu", packs=packs), 24).memory.peaks
        for phase, measured in measure_passes(spec, 16, dtype, 24).items():
            predicted = peaks[phase].total_bytes - peaks[phase].live_bytes[MICRO_BATCHES]
            text = ", ".join(f"{name} {value}" for name, value in changes.items())
            what = f"{spec.family}, {text}, {str(dtype).removeprefix('torch.')}, {phase}"
            rows.append({"what": what, "predicted": predicted, "measured": measured})
    return rows


def _report_progress(name: str, text: str) -> None:
    print(f"{name}: {text}", file=sys.stderr, flush=True)


def plan_of(name: str, nvme: str | None) -> Plan:
    """Return the plan of a run of two ranks.

    Args:
        name: name of the run, a key of `RUNS`.
        nvme: folder for offloading to NVMe.
    """
    options = dict(RUNS[name])
    stage, offload = options.pop("stage"), options.pop("offload", "none")
    training = TrainingSpec(data="synthetic", micro_batch=8, **options)
    spec, cluster = parse_model_spec(LARGE), local_cpu_cluster(2)
    return make_plan(spec, cluster, training, stage=stage, tile_relations=TILE, offload=offload, nvme_path=nvme)


def predict_again(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return recorded rows of two ranks with the planner's present predictions."""
    known = {(row["run"], row["rank"], row["what"]): row for row in rows}
    result = []
    for row in rows:
        kind, _, phase = row["what"].rpartition(" of " if row["what"].startswith("peak") else " in ")
        prediction = predict_rank(plan_of(row["run"], "/nvme"), row["rank"])
        size, predicted = row["measured_bytes"], row["predicted_bytes"]
        if kind:
            init = known[row["run"], row["rank"], row["what"].replace(phase, Phase.INIT)]
            # A resumed run has also built the engine, so its peak is at least that of init.
            size = max(size, init["measured_bytes"]) if phase == Phase.RESUME else size
            if kind == PROCESS_PREFIX:
                # The row of init includes the process's memory before the model was built, which has not changed.
                predicted = init["predicted_bytes"] + _held(prediction, phase) - _held(prediction, Phase.INIT)
            else:
                predicted = prediction.bytes_of(phase)
        result.append(
            row
            | {
                "what": current_label(row["what"]),
                "predicted_bytes": predicted,
                "measured_bytes": size,
                "ratio": predicted / (size or 1),
            }
        )
    return result


def _held(prediction: MemoryEstimate, phase: str) -> int:
    return prediction.bytes_of(phase, Tier.HOST) + prediction.bytes_of(phase, Tier.PINNED)


def rank_rows(names: list[str]) -> Iterator[dict[str, Any]]:
    """Run two ranks from init to resume and yield every measured quantity with its prediction."""
    for name in names:
        with tempfile.TemporaryDirectory(prefix="translution-accuracy-") as folder:
            nvme = Path(folder) / "nvme"
            nvme.mkdir()
            plan = plan_of(name, str(nvme))
            run = measure_plan(few_steps(plan), Path(folder) / "plan", partial(_report_progress, name))
            for row in compare_run(run).to_dict("records"):
                yield {"run": name} | {str(key): value for key, value in row.items()}


def _ratios(rows: list[dict[str, Any]]) -> pd.Series[float]:
    table = pd.DataFrame(rows)
    return table["predicted"] / table["measured"]


def _span(ratios: pd.Series[float]) -> str:
    known = ratios.dropna()
    return "" if known.empty else f"{known.min():.3f} to {known.max():.3f}"


def _ranks_table(rows: list[dict[str, Any]]) -> list[str]:
    table = pd.DataFrame(rows)
    kinds = {
        "states between steps": table["what"] == RESIDENT,
        "peaks by phase": table["what"].str.startswith("peak of"),
        "saved for backward": table["what"].map(current_label) == SAVED,
        "pinned buffers": table["tier"] == "pinned",
        "files on NVMe": table["tier"] == "nvme",
        "resident set": table["what"].str.startswith(PROCESS_PREFIX),
    }
    lines = [f"| run | {' | '.join(kinds)} |", f"|---|{'--:|' * len(kinds)}"]
    for name in table["run"].unique():
        own = table["run"] == name
        lines.append(f"| {name} | {' | '.join(_span(table[own & kind]['ratio']) for kind in kinds.values())} |")
    return lines


def _misses(rows: list[dict[str, Any]]) -> list[str]:
    """Return one line for each peak outside [1.00, 1.05] and each resident set that is more than 10% off."""
    lines = []
    for row in rows:
        process = row["what"].startswith(PROCESS_PREFIX)
        low, high = (0.9, 1.1) if process else (1.0, 1.05)
        if (process or row["what"].startswith("peak of")) and not low <= row["ratio"] <= high:
            lines.append(f"- {row['run']}, rank {row['rank']}, {row['what']}: {row['ratio']:.3f}")
    return lines


def rehearsal_rows(run: Path) -> dict[str, Any]:
    """Return the description and the rows of the rehearsal in a run folder."""
    found = read_rehearsal(run)
    if found is None:
        sys.exit(f"rehearsal: {run} has no rehearsal")
    rows = [
        {"what": what, "predicted": predicted, "measured": measured}
        # Predict again, since the planner may have been corrected after the measurement.
        for _, what, predicted, measured in predicted_and_measured(predict_rehearsal(load_plan(run)), found.measurement)
        if measured and what != "other"
    ]
    text = f"Rank {found.rank} of {found.ranks} of {found.plan}, {found.layers} of {found.depth} layers run"
    seconds = max(found.seconds.items())[1]
    return {"what": text, "made": found.made.model_dump(), "seconds": sum(seconds.values()), "rows": rows}


def _rehearsal_lines(rehearsal: dict[str, Any]) -> list[str]:
    made = rehearsal["made"]
    lines = ["## One rank of a large cluster", "", f"{rehearsal['what']}: `{made['command']}`, {made['time_utc']}."]
    lines += ["Memory is real; values are meaningless, since matrix products are allocated but not computed.", ""]
    lines += ["| what | predicted | measured | ratio |", "|---|--:|--:|--:|"]
    for row in rehearsal["rows"]:
        sizes = f"{format_bytes(row['predicted'])} | {format_bytes(row['measured'])}"
        lines.append(f"| {row['what']} | {sizes} | {row['predicted'] / row['measured']:.3f} |")
    return [*lines, ""]


def render(document: dict[str, Any]) -> str:
    """Return the report as Markdown."""
    versions = ", ".join(f"{name} {version}" for name, version in document["machine"].items())
    parts = ["# Predicted and measured memory", "", f"`{document['command']}` on {document['date']}: {versions}."]
    parts += ["Ratios are predicted over measured; all rows are in [accuracy.json](accuracy.json).", ""]
    if "predicted" in document:
        parts += ["The measurements of two ranks are compared with newer predictions:"]
        parts += [f"{document['predicted']}.", ""]
    counts, passes, ranks, times = (document["sections"].get(name, []) for name in SECTIONS)
    if counts:
        exact = sum(row["predicted"] == row["measured"] for row in counts)
        parts += ["## Parameters", "", f"{exact} of {len(counts)} counts, one per preset and operator, are exact.", ""]
    if passes:
        ratios = _ratios(passes)
        inside = int(ratios.between(0.998, 1.02).sum())
        parts += [
            "## Peaks of one process",
            "",
            f"Ratios of {len(passes)} peaks of forward and backward: {_span(ratios)}; ",
        ]
        parts[-1] += f"{inside} of them are between 0.998 and 1.02."
        parts.append("")
    if ranks:
        parts += ["## Two ranks, init to resume", "", *_ranks_table(ranks), ""]
        misses = _misses(ranks)
        parts += ["Peaks outside 1.00 to 1.05, and resident sets outside 0.9 to 1.1:", "", *(misses or ["- none"]), ""]
    if times:
        slowest = max(times, key=lambda row: row["seconds"])
        text = f"At most {slowest['seconds'] * 1e3:.0f} ms per estimate for {len(times)} presets on 512 ranks "
        text += f"(maximum: {slowest['what']})."
        parts += ["## Time of an estimate", "", text, ""]
    if "rehearsal" in document:
        parts += _rehearsal_lines(document["rehearsal"])
    return "\n".join(parts)


def _in_own_process(section: str) -> list[dict[str, Any]]:
    """Compute a section's rows in a new process, where allocations are counted from the first tensor."""
    done = subprocess.run([sys.executable, __file__, "--rows", section], capture_output=True, text=True, check=True)
    rows: list[dict[str, Any]] = json.loads(done.stdout)
    return rows


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder for accuracy.md and accuracy.json")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="sections to run")
    parser.add_argument("--runs", nargs="+", choices=list(RUNS), default=list(RUNS), help="runs of two ranks")
    parser.add_argument("--measured", type=Path, help="accuracy.json with recorded two-rank runs to predict again")
    parser.add_argument("--rehearsal", type=Path, help="run folder of a rehearsal to include")
    parser.add_argument("--rows", choices=("counts", "passes"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rows:
        count_every_allocation()
        print(json.dumps(count_rows() if arguments.rows == "counts" else pass_rows()))
        return
    document = describe_run("accuracy")
    document["machine"]["deepspeed"] = importlib.metadata.version("deepspeed")
    if arguments.measured:
        known = json.loads(arguments.measured.read_text(encoding="utf-8"))
        known["sections"]["ranks"] = predict_again(known["sections"]["ranks"])
        known["predicted"] = f"`{document['command']}` on {document['date']}"
        write_report(arguments.out, "accuracy", known, render(known))
        return
    sections: dict[str, list[dict[str, Any]]] = {}
    for name in arguments.only:
        here: dict[str, Callable[[], Iterable[dict[str, Any]]]] = {
            "ranks": partial(rank_rows, arguments.runs),
            "times": time_rows,
        }
        sections[name] = list(here[name]()) if name in here else _in_own_process(name)
    document["sections"] = sections
    if arguments.rehearsal:
        document["rehearsal"] = rehearsal_rows(arguments.rehearsal)
    write_report(arguments.out, "accuracy", document, render(document))


if __name__ == "__main__":
    main()
