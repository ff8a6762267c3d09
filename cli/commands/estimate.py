"""``translution estimate``."""

from __future__ import annotations

import re
from typing import Annotated, Any

import typer
from pydantic import TypeAdapter

from translution.planner.analysis.operator_costs import LABELS, compare_operators
from translution.planner.common.phases import Phase
from translution.planner.common.schema import validate
from translution.planner.common.units import format_bytes, format_count, format_flops
from translution.planner.config.model import ModelSpec
from translution.planner.config.training import TrainingSpec
from translution.planner.costs.parameters import TABLES
from translution.planner.hardware.cluster import ClusterSpec
from translution.planner.memory.estimate import MemoryEstimate, estimate_memory
from translution.planner.plans.defaults import choose_tile, choose_zero
from translution.planner.simulator.network.ops import DtypeSizes

from ..options import (
    C1Option,
    C2Option,
    JsonOption,
    MicroBatchOption,
    ModelArgument,
    OperatorOption,
    PrecisionOption,
    RelativeLayersOption,
    RolesOption,
    SetOption,
    resolve_model,
)
from ..output import console, make_table, note, print_json
from . import app

_TRAINING: TypeAdapter[TrainingSpec] = TypeAdapter(TrainingSpec)


def per_rank(spec: ModelSpec, training: TrainingSpec, ranks: int) -> dict[int, MemoryEstimate]:
    """Memory of one of so many GPU ranks for each ZeRO stage, with the constants of an H100."""
    cluster = ClusterSpec(name="any", gpu="H100", ranks_per_node=ranks, device_memory_bytes=2**60)
    estimates = {}
    for stage in (0, 1, 2, 3):
        # Only stage 3 gains from tiles.
        tile = choose_tile(spec, ranks) if stage == 3 else None
        zero = choose_zero(spec, tile, stage, ranks)
        estimates[stage] = estimate_memory(spec, cluster, training, zero, tile)
    return estimates


@app.command(
    "estimate",
    epilog="Examples: **translution estimate vit-base/16** · **translution estimate gpt-large/1024 --operator alpha "
    "--c1 8 --c2 8** · **translution estimate my.yaml --ranks 64 --precision bf16 --json**",
)
def estimate_cli(
    model: ModelArgument,
    operator: OperatorOption = None,
    roles: RolesOption = None,
    c1: C1Option = None,
    c2: C2Option = None,
    relative_layers: RelativeLayersOption = None,
    settings: SetOption = None,
    ranks: Annotated[int, typer.Option(min=1, max=2**20, help="Ranks that share the training state.")] = 8,
    micro_batch: MicroBatchOption = 1,
    precision: PrecisionOption = "fp32",
    as_json: JsonOption = False,
) -> None:
    """Print what a model costs: parameters, activations, operations, and memory per rank."""
    spec = resolve_model(model, operator, roles, c1, c2, relative_layers, settings)
    values = {"micro_batch": micro_batch, "precision": precision, "data": "synthetic"}
    training = validate(_TRAINING, values, "estimate", tuple(TrainingSpec.model_fields))
    if re.match(r"vit-b/", model.lower()):
        note(f"{model} is the paper's name for {spec.name}; for ViT-Base write vit-base/{model.split('/')[-1]}")
    widths = DtypeSizes.of(training.dtype_bytes, "cuda")
    described = compare_operators(spec, micro_batch, widths)
    estimates = per_rank(spec, training, ranks)
    if as_json:
        document = {"model": spec.model_dump(mode="json"), "precision": precision, "micro_batch": micro_batch}
        own = {key: value for key, value in described[0].items() if key != "operator"}
        stages = [{"stage": stage, **estimate.model_dump(mode="json")} for stage, estimate in estimates.items()]
        print_json(document | own | {"comparison": described, "per_rank": {"ranks": ranks, "zero": stages}})
        return
    _print_tables(spec, described, estimates, ranks, micro_batch, precision)


def _print_tables(
    spec: ModelSpec,
    described: list[dict[str, Any]],
    estimates: dict[int, MemoryEstimate],
    ranks: int,
    micro_batch: int,
    precision: str,
) -> None:
    out = console()
    samples = "one sample" if micro_batch == 1 else f"{micro_batch} samples"
    rows: list[tuple[str, ...]] = []
    for entry in described:
        kept = entry["activations_bytes"]
        total = entry["parameters"]["total"]
        rows.append(
            (
                LABELS[entry["operator"]],
                format_count(total),
                f"{entry['parameters']['components'].get(TABLES, 0) / total:.1%}",
                format_bytes(entry["training_state_bytes"]),
                format_bytes(kept["published"]),
                format_bytes(kept["ours"]),
                format_flops(entry["flops_per_sample"]["training_step"]),
            )
        )
    columns: tuple[str, ...] = (
        "operator", "parameters", "in tables", "state (AdamW)", "kept, published", "kept, ours", "train / sample",
    )  # fmt: skip
    out.print(make_table(f"{spec.name}: {samples}, {precision}", columns, rows))
    out.print("kept: activations that one forward pass keeps for backward; state: 16 bytes per parameter")
    components = described[0]["parameters"]["components"]
    rows = [(name, f"{count:,}") for name, count in components.items()]
    rows.append(("total", f"{described[0]['parameters']['total']:,}"))
    out.print()
    out.print(make_table(f"Parameters of {LABELS[spec.operator]}, exact", ("component", "parameters"), rows))
    rows = []
    for stage, estimate in estimates.items():
        step = max(estimate.bytes_of(phase) for phase in (Phase.FORWARD, Phase.BACKWARD))
        cells = (estimate.resident_bytes, step, estimate.bytes_of(Phase.STEP), estimate.peak_bytes, estimate.host_bytes)
        rows.append((f"ZeRO-{stage}", *(format_bytes(size) for size in cells)))
    columns = ("plan", "between steps", "forward, backward", "optimizer step", "peak of device", "peak of host")
    out.print()
    out.print(
        make_table(f"Memory of each of {ranks} ranks on H100s, no offload, micro-batch {micro_batch}", columns, rows)
    )
