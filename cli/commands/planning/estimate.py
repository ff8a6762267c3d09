"""``translution estimate``."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated

import typer
from rich.table import Table

from translution import planner
from translution.planner.common import Phase, format_bytes, format_count, format_flops
from translution.planner.config import OPERATOR_LABELS
from translution.planner.costs import TABLES

from ...options import (
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
    join_settings,
)
from ...output import console, make_table, note, print_json
from .. import app


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
    precision: PrecisionOption = None,
    as_json: JsonOption = False,
) -> None:
    """Print what a model costs: parameters, activations, operations, and memory per rank."""
    flags = {"operator": operator, "roles": roles, "c1": c1, "c2": c2, "relative_layers": relative_layers}
    spec = planner.load_model(model, **join_settings(flags, settings, "--set"))
    # One node of H100s with unlimited memory: every stage is shown, whether it fits or not.
    cluster = planner.ClusterSpec(name="any", gpu="H100", ranks_per_node=ranks, device_memory_bytes=2**60)
    costs = planner.estimate(spec, cluster=cluster, precision=precision, micro_batch=micro_batch)
    if re.match(r"vit-b/", model.lower()):
        note(f"{model} is the paper's name for {spec.name}; for ViT-Base write vit-base/{model.split('/')[-1]}")
    if as_json:
        print_json(costs.document())
        return
    out = console()
    out.print(_operators_table(costs))
    out.print("saved: activations that one forward pass saves for backward; state: 16 bytes per parameter")
    for table in (_parameters_table(costs), _memory_table(costs)):
        out.print()
        out.print(table)


def _operators_table(costs: planner.ModelCosts) -> Table:
    samples = "one sample" if costs.micro_batch == 1 else f"{costs.micro_batch} samples"
    rows = [
        (
            OPERATOR_LABELS[entry.operator],
            format_count(entry.parameters.total),
            f"{entry.parameters.components.get(TABLES, 0) / entry.parameters.total:.1%}",
            format_bytes(entry.training_state_bytes),
            format_bytes(entry.activations.published),
            format_bytes(entry.activations.ours),
            format_flops(entry.flops.training_step),
        )
        for entry in costs.comparison
    ]
    columns = (
        "operator", "parameters", "in tables", "state (AdamW)", "saved, published", "saved, ours", "train / sample",
    )  # fmt: skip
    return make_table(f"{costs.model.name}: {samples}, {costs.precision}", columns, rows)


def _parameters_table(costs: planner.ModelCosts) -> Table:
    rows = [(name, f"{count:,}") for name, count in costs.parameters.components.items()]
    rows.append(("total", f"{costs.parameters.total:,}"))
    title = f"Parameters of {OPERATOR_LABELS[costs.model.operator]}"
    return make_table(title, ("component", "parameters"), rows)


def _memory_table(costs: planner.ModelCosts) -> Table:
    def sizes(estimate: planner.MemoryEstimate) -> Iterator[int]:
        yield estimate.resident_bytes
        yield max(estimate.bytes_of(phase) for phase in (Phase.FORWARD, Phase.BACKWARD))
        yield estimate.bytes_of(Phase.STEP)
        yield estimate.peak_bytes
        yield estimate.host_bytes

    rows = [
        (f"ZeRO-{stage}", *(format_bytes(size) for size in sizes(estimate))) for stage, estimate in costs.stages.items()
    ]
    columns = ("stage", "between steps", "forward, backward", "optimizer step", "peak of device", "peak of host")
    title = f"Memory per rank, {costs.world_size} ranks on H100s, no offload, micro-batch {costs.micro_batch}"
    return make_table(title, columns, rows)
