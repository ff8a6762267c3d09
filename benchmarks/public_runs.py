"""Compare predicted step times with those that others have published of real runs on GPUs.

python benchmarks/public_runs.py --out reports     # seconds; predictions only, nothing runs

benchmarks/public/mpt_fsdp.csv has 104 runs of MPT models on A100 and H100, from mosaicml/llm-foundry,
scripts/train/benchmarking/README.md at 8c8dd48. Their FULL_SHARD acts as ZeRO-3 and SHARD_GRAD_OP as ZeRO-2. They
gather parameters ahead and reduce gradients while backward computes, so the knobs here do, too. Their models have tied
embeddings, no biases, and a fused loss that never holds all logits in fp32. All of them fitted their GPUs.
"""

from __future__ import annotations

import argparse
import csv
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from common import describe_run, write_report

from translution.planner.common import Phase
from translution.planner.config import RunConfig, TrainingSpec, parse_model_spec
from translution.planner.hardware import load_cluster
from translution.planner.memory import estimate_memory
from translution.planner.plans import choose_zero, override_zero
from translution.planner.timing import StepTime, estimate_step_time

DATA = Path(__file__).with_name("public") / "mpt_fsdp.csv"
AHEAD = {"prefetch_bucket_elements": 50_000_000, "max_live_elements": 10**9, "max_reuse_distance_elements": 10**9}
"""DeepSpeed's default knobs, with which ZeRO-3 gathers ahead."""
LLAMA = {"norm": "rms", "ffn": "swiglu", "bias": False, "rotary": True}
ALLOWED = 0.2
"""Relative error above which a run is listed as missed."""


class PublicRun(NamedTuple):
    """One published run and what is predicted of it."""

    name: str
    gpu: str
    published_s: float
    predicted: StepTime
    utilization: float
    """Predicted peak of a GPU's memory, divided by its size."""

    @property
    def ratio(self) -> float:
        """Predicted divided by published seconds of a step."""
        return self.predicted.likely_s / self.published_s

    @property
    def inside(self) -> bool:
        """Whether the published time is inside the predicted interval."""
        return self.predicted.low_s <= self.published_s <= self.predicted.high_s


def run_config(row: Mapping[str, str]) -> RunConfig:
    """Return the run that a row of the table describes."""
    sizes = {name: int(row[name]) for name in ("context", "vocabulary", "dim", "depth", "heads")}
    model = {"family": "gpt", "operator": "attention", "checkpointing": row["checkpointing"]} | sizes
    model |= {"tied_embeddings": True, "bias": False}
    spec = parse_model_spec(model)
    cluster = load_cluster(f"{int(row['gpus']) // int(row['gpus_per_node'])}x{row['gpus_per_node']}x{row['gpu']}")
    training = TrainingSpec(
        precision="bf16",
        micro_batch=int(row["micro_batch"]),
        gradient_accumulation_steps=int(row["accumulation"]),
        data="synthetic",
        loss="chunked",
    )
    stage = 3 if row["sharding"] == "FULL_SHARD" else 2
    zero = choose_zero(spec, None, stage, cluster.world_size)
    zero = override_zero(zero, {"overlap_comm": True} | (AHEAD if stage == 3 else {}))
    return RunConfig(spec, cluster, training, zero)


def predict_runs(path: Path = DATA) -> list[PublicRun]:
    """Predict every run of a table."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    return [
        PublicRun(
            f"{row['model']}, {row['context']} tokens, {row['gpus']} {row['gpu']}, micro-batch {row['micro_batch']}",
            row["gpu"],
            float(row["step_s"]),
            estimate_step_time(run),
            utilization(run),
        )
        for row, run in ((row, run_config(row)) for row in rows)
    ]


def utilization(run: RunConfig) -> float:
    """Return the predicted peak of a GPU's memory, divided by its size: up to 1 the run fits, without headroom."""
    return estimate_memory(run).peak_bytes / run.cluster.device_memory_bytes


class PublicFit(NamedTuple):
    """A published micro-batch that fits or does not, and the predicted utilization of a GPU's memory."""

    what: str
    source: str
    fitted: bool
    utilization: float


def predict_fits() -> list[PublicFit]:
    """Predict whether the micro-batches of BigScience's 52-billion model fit 64 V100 of 32 GiB."""
    square = 8192**2
    knobs = {
        "overlap_comm": True,
        "reduce_bucket_elements": square,
        "prefetch_bucket_elements": square * 9 // 10,
        "persistence_threshold_elements": 10 * 8192,
        "max_live_elements": 10**9,
        "max_reuse_distance_elements": 10**9,
    }
    sizes = {"dim": 8192, "depth": 64, "heads": 32, "context": 1024, "vocabulary": 50257, "dropout": 0.1}
    more = {"checkpointing": "offload", "tied_embeddings": True}
    return [
        PublicFit(
            f"52 billion parameters, ZeRO-3 on 16 nodes of 4 V100-32, micro-batch {batch}",
            "BigScience, experiments/gpt2.md and gpt2-meg-ds-zero",
            fitted,
            utilization(_gpt("16x4xV100-32", 3, sizes | more, {"precision": "fp16", "micro_batch": batch}, **knobs)),
        )
        for batch, fitted in ((20, True), (22, False), (24, False))
    ]


class PublicFigure(NamedTuple):
    """One published figure of a single run, what is predicted of it, and the relative error that is allowed."""

    what: str
    source: str
    published: float
    predicted: float
    allowed: float

    @property
    def ratio(self) -> float:
        """Predicted divided by published."""
        return self.predicted / self.published


def _gpt(
    cluster: str, stage: Literal[2, 3], fields: Mapping[str, Any], training: Mapping[str, Any], **zero: Any
) -> RunConfig:
    spec = parse_model_spec({"family": "gpt", "operator": "attention", "checkpointing": "block"} | fields)
    loaded = load_cluster(cluster)
    chosen = choose_zero(spec, None, stage, loaded.world_size, offload=zero.pop("offload", "none"))
    return RunConfig(spec, loaded, TrainingSpec(data="synthetic", **training), override_zero(chosen, zero))


def _optimizer_step_s(run: RunConfig) -> float:
    """Seconds from the last gradient to the updated parameters on the device."""
    parts = {part.name: part.likely_s for part in estimate_step_time(run).breakdown}
    return parts["optimizer update"] + parts["parameters from the host after the update"]


def predict_figures() -> list[PublicFigure]:
    """Predict the published figures of single runs with DeepSpeed."""
    knobs = {"overlap_comm": True, "reduce_bucket_elements": 50_000_000, "sub_group_elements": 10**9} | AHEAD
    wide = {"dim": 4096, "heads": 32}
    examples = _gpt(
        "4xH100",
        3,
        wide | {"depth": 32, "context": 512, "vocabulary": 50257},
        {"precision": "bf16", "micro_batch": 1},
        persistence_threshold_elements=0,
        **knobs,
    )
    name = "GPT of 6.9 billion parameters, ZeRO-3 on 4 H100"
    source = "DeepSpeedExamples, training/bf16_master_weight"
    memory = estimate_memory(examples)
    between, peak = (memory.allocated_bytes_of(phase) / 2**30 for phase in (Phase.BETWEEN, Phase.STEP))
    offloaded = {"offload": "cpu-optimizer"}
    ten = _gpt(
        "1xV100-32",
        2,
        wide | {"depth": 50, "context": 1024, "vocabulary": 50257},
        {"precision": "fp16", "micro_batch": 10},
        **offloaded,
    )
    llama = _gpt(
        "4xA100-80",
        2,
        wide | {"depth": 32, "context": 2048, "vocabulary": 32000, "ffn_dim": 11008} | LLAMA,
        {"precision": "bf16", "micro_batch": 1},
        **offloaded,
    )
    return [
        PublicFigure(f"{name}: allocated between steps, GiB", source, 25.74, between, 0.05),
        PublicFigure(f"{name}: allocated at the peak, GiB", source, 31.38, peak, 0.05),
        PublicFigure(f"{name}: step, s", source, 0.602, estimate_step_time(examples).likely_s, 0.25),
        PublicFigure(
            "10 billion parameters, optimizer on the host of one V100: optimizer step, s",
            "DeepSpeed's tutorial of ZeRO-Offload: 7.6 to 8.0 s",
            7.8,
            _optimizer_step_s(ten),
            0.35,
        ),
        PublicFigure(
            "7 billion parameters, optimizer on the host of 4 A100: optimizer step, s",
            "ZenFlow's announcement: more than 4 s",
            4.0,
            _optimizer_step_s(llama),
            0.35,
        ),
    ]


def summarize(runs: list[PublicRun]) -> dict[str, Any]:
    """Return the figures that a set of runs is judged by."""
    ratios = [run.ratio for run in runs]
    return {
        "runs": len(runs),
        "median": statistics.median(ratios),
        "lowest": min(ratios),
        "highest": max(ratios),
        "within_20_percent": sum(abs(ratio - 1) <= ALLOWED for ratio in ratios) / len(ratios),
        "inside_the_interval": sum(run.inside for run in runs) / len(ratios),
        "widest_above": max(run.predicted.high_s / run.predicted.likely_s - 1 for run in runs),
        "widest_below": max(1 - run.predicted.low_s / run.predicted.likely_s for run in runs),
        "fitting": sum(run.utilization <= 1 for run in runs),
        "highest_utilization": max(run.utilization for run in runs),
    }


def render(document: dict[str, Any]) -> str:
    """Return the report as Markdown."""
    lines = ["# Predicted and published time of a step", ""]
    lines += [f"`{document['command']}` on {document['date']}. Nothing ran on a GPU of ours.", ""]
    lines += [
        "The published runs are of MPT models (attention) under FSDP in bf16, from",
        "[mosaicml/llm-foundry](https://github.com/mosaicml/llm-foundry) at 8c8dd48 (scripts/train/benchmarking).",
        "The predictions use the catalog's GPUs and nodes. The shares of the peak that matrix products and attention",
        "reach were chosen by these runs, one of each for A100 and for H100; everything else is computed.",
        "",
        "| GPU | runs | median | lowest | highest | within 20% | inside the interval |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for gpu, row in document["summary"].items():
        lines.append(
            f"| {gpu} | {row['runs']} | {row['median']:.3f} | {row['lowest']:.2f} | {row['highest']:.2f} | "
            f"{row['within_20_percent']:.0%} | {row['inside_the_interval']:.0%} |"
        )
    every = document["summary"]["all"]
    lines += [
        "",
        f"All of these runs fitted their GPUs. Predicted without headroom, {every['fitting']} of {every['runs']} fit;",
        f"the highest peak takes {every['highest_utilization']:.0%} of its GPU's memory.",
        "",
        "| what | published | predicted peak, of a GPU's memory | source |",
        "|---|---|--:|---|",
    ]
    for row in document["fits"]:
        fitted = "fits" if row["fitted"] else "out of memory"
        lines.append(f"| {row['what']} | {fitted} | {row['utilization']:.0%} | {row['source']} |")
    lines += ["", "Single figures, of runs with DeepSpeed:", ""]
    lines += ["| what | published | predicted | ratio | source |", "|---|--:|--:|--:|---|"]
    for row in document["figures"]:
        numbers = f"{row['published']:g} | {row['predicted']:.3g} | {row['ratio']:.2f}"
        lines.append(f"| {row['what']} | {numbers} | {row['source']} |")
    lines += ["", "Median, lowest and highest are predicted divided by published seconds."]
    lines += [
        f"The interval reaches at most {every['widest_above']:.0%} above and {every['widest_below']:.0%} below the",
        "prediction.",
        "",
        "| run | published | predicted | interval | ratio |",
        "|---|--:|--:|--:|--:|",
    ]
    for row in document["rows"]:
        mark = "" if row["inside"] else " outside"
        lines.append(
            f"| {row['run']} | {row['published_s']:.2f} s | {row['predicted_s']:.2f} s | "
            f"{row['low_s']:.2f} to {row['high_s']:.2f} s{mark} | {row['ratio']:.2f} |"
        )
    return "\n".join(lines) + "\n"


def make_document(runs: list[PublicRun]) -> dict[str, Any]:
    """Return everything that the report shows."""
    groups = {"all": runs} | {
        gpu: [run for run in runs if run.gpu == gpu] for gpu in dict.fromkeys(r.gpu for r in runs)
    }
    rows = [
        {
            "run": run.name,
            "gpu": run.gpu,
            "published_s": run.published_s,
            "predicted_s": run.predicted.likely_s,
            "low_s": run.predicted.low_s,
            "high_s": run.predicted.high_s,
            "ratio": run.ratio,
            "inside": run.inside,
            "utilization": run.utilization,
        }
        for run in sorted(runs, key=lambda run: run.ratio)
    ]
    return {
        "summary": {name: summarize(group) for name, group in groups.items()},
        "rows": rows,
        "fits": [fit._asdict() for fit in predict_fits()],
        "figures": [figure._asdict() | {"ratio": figure.ratio} for figure in predict_figures()],
    }


def main() -> None:
    """Predict the runs and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder for public.json and public.md")
    arguments = parser.parse_args()
    document = describe_run("public_runs") | make_document(predict_runs())
    write_report(arguments.out, "public", document, render(document))


if __name__ == "__main__":
    main()
