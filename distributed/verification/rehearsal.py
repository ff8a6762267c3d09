"""Rehearsals: one rank of a planned world run alone on this machine, for the memory it takes.

The rank runs in a process of its own (rehearse.py), so that nothing before it counts. A rehearsal of
some layers runs twice, the second time with one layer less, and goes on from there in a straight line.

    rehearsal.json          what was measured, beside what is predicted
    layers_K/               the run folder of the rank with K layers, where the plan has more
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from translution.planner.common.errors import InputError, RunFailedError
from translution.planner.common.files import write_text
from translution.planner.common.machine import available_memory_bytes
from translution.planner.common.phases import Tier
from translution.planner.common.provenance import Provenance, provenance
from translution.planner.common.schema import Schema, parse_json
from translution.planner.common.units import GIB, format_bytes
from translution.planner.config.model import override
from translution.planner.config.zero import ZeroSpec
from translution.planner.deepspeed.config import check_training_state
from translution.planner.hardware.cluster import local_cpu_cluster
from translution.planner.memory.estimate import MemoryEstimate, ledger
from translution.planner.plans.plan import Plan, load_plan
from translution.planner.simulator.engine.base import EngineConfig
from translution.planner.simulator.lifecycle import simulate

from ..launcher.launch import OnStage, new_run_folder
from ..launcher.local_processes import OnMetrics, run_ranks
from ..runs.folder import LOG, PLAN, make_run_folders
from ..runs.measurement import MemoryMeasurement, read_memory
from ..runs.status import raise_unless_finished
from ..system.compiled_ops import needed_ops, prepare_ops
from ..system.environment import check_packages, launch_environment
from .extrapolate import extrapolate, join_init, largest_sub_group

REHEARSAL = "rehearsal.json"
PROCESS_BYTES = GIB
"""Room for the process itself: libraries, and the events of a measured step."""


class Rehearsal(Schema):
    """What a rehearsal found. Values were meaningless, allocations real."""

    plan: str
    """Model and cluster."""
    rank: int
    ranks: int
    depth: int
    """Layers of the plan's model."""
    layers: int
    """Layers that were run; where fewer than depth, the measurement is extrapolated from them."""
    computed: bool
    """Whether matrix products were computed, rather than only allocated."""
    planned_bytes: dict[str, int]
    """The plan's own prediction for each tier of the rank, at its worst moment."""
    prediction: MemoryEstimate
    """The same rank's ledger here: all tiers are host memory, nothing is rounded or copied by a backend."""
    measurement: MemoryMeasurement
    """Of the whole model."""
    measured_layers: dict[int, MemoryMeasurement]
    """What was measured, by number of layers."""
    seconds: dict[int, dict[str, float]]
    """Of the phases of the last step and of all, by number of layers."""
    made: Provenance

    @property
    def extrapolated(self) -> bool:
        """Whether the measurement follows from fewer layers."""
        return self.layers < self.depth


_REHEARSAL: TypeAdapter[Rehearsal] = TypeAdapter(Rehearsal)


def format_layers(count: int) -> str:
    """``1 layer``, ``2 layers``."""
    return f"{count} layer{'s' * (count != 1)}"


def read_rehearsal(run: Path) -> Rehearsal | None:
    """The rehearsal of a run folder, or None if it holds none."""
    path = run / REHEARSAL
    return parse_json(_REHEARSAL, path.read_bytes(), str(path)) if path.is_file() else None


def predict(plan: Plan) -> MemoryEstimate:
    """The ledger of a plan's rank as it is rehearsed: what a CPU stands in for lies on one tier."""
    replayed = simulate(plan.model, plan.cluster, plan.training, plan.zero, plan.tile_relations, rehearsed=True)
    return ledger(replayed, EngineConfig(plan.training, plan.zero, plan.cluster.world_size), None)


def with_layers(plan: Plan, layers: int) -> Plan:
    """The same plan for a model with another number of layers; its knobs stay.

    Raises:
        InputError: if the number is out of range, or layers differ, so that none stands for the others.
    """
    depth = plan.model.depth
    if not 2 <= layers <= depth:
        raise InputError(f"layers: {layers} is not allowed: must be from 2 to {depth}, the layers of the plan")
    if len(set(plan.model.layer_operators)) > 1:
        raise InputError(f"layers: {layers} is not allowed: the layers of {plan.model.name} differ; rehearse them all")
    return _cut(plan, layers)


def _cut(plan: Plan, layers: int) -> Plan:
    if layers == plan.model.depth:
        return plan
    model = override(plan.model, depth=layers, relative_layers="all")
    return plan.model_copy(update={"model": model, "prediction": predict(plan.model_copy(update={"model": model}))})


def _with_nvme_path(plan: Plan, path: str | None) -> Plan:
    """The plan with another folder for what goes to NVMe, and that folder checked."""
    sections = {name: getattr(plan.zero, name) for name in ("offload_optimizer", "offload_param")}
    on_nvme = {name: section for name, section in sections.items() if section.device == "nvme"}
    if path is not None and not on_nvme:
        raise InputError(f"nvme_path: {path!r} is not allowed: the plan puts nothing on NVMe")
    if path is not None:
        changed = {name: section.model_copy(update={"nvme_path": path}) for name, section in on_nvme.items()}
        plan = plan.model_copy(update={"zero": plan.zero.model_copy(update=changed)})
    for name in on_nvme:
        folder = Path(getattr(plan.zero, name).nvme_path)
        if not (folder.is_dir() and os.access(folder, os.W_OK)):
            raise InputError(
                f"nvme_path: {str(folder)!r} is not allowed: must be a folder of this machine that can be written; "
                "--nvme-path names another"
            )
    return plan


def _nvme_paths(zero: ZeroSpec) -> set[str]:
    return {path for path in (zero.offload_optimizer.nvme_path, zero.offload_param.nvme_path) if path}


def check(plan: Plan, rank: int) -> None:
    """Whether this machine can rehearse a rank.

    Raises:
        InputError: if the world has no such rank, DeepSpeed does not run the optimizer on a CPU, or
            memory or NVMe have too little room.
        MissingPackageError: if torch or DeepSpeed is absent.
    """
    ranks = plan.cluster.world_size
    if not 0 <= rank < ranks:
        raise InputError(f"rank: {rank} is not allowed: must be from 0 to {ranks - 1}")
    check_training_state(plan.training, plan.zero, "cpu")
    prediction = predict(plan)
    needed = prediction.highest(Tier.HOST) + prediction.highest(Tier.PINNED) + PROCESS_BYTES
    available = available_memory_bytes()
    if needed > available:
        raise InputError(
            f"rehearse: one rank of {plan.model.depth} layers needs {format_bytes(needed)} of memory, this machine "
            f"has {format_bytes(available)} left: rehearse fewer layers with --layers"
        )
    for path in _nvme_paths(plan.zero):
        wanted, free = prediction.highest(Tier.NVME), shutil.disk_usage(path).free
        if wanted > free:
            raise InputError(f"rehearse: one rank writes {format_bytes(wanted)}, {path} has {format_bytes(free)} left")
    check_packages(ops_of(plan))


def environment(plan: Plan, rank: int, *, compute: bool) -> dict[str, str]:
    """What the rank needs in its environment.

    Without products to compute it has one thread: thousands of small copies would spend their time
    in waiting for each other's halves.
    """
    return {
        **launch_environment(local_cpu_cluster(1)),
        **({} if compute else {"OMP_NUM_THREADS": "1"}),
        "RANK": str(rank),
        "LOCAL_RANK": "0",
        "WORLD_SIZE": str(plan.cluster.world_size),
        # DeepSpeed asks for them; the fake process group does not.
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29500",
        # Half of the time would go into first touching fresh memory, in pages of 4 KiB.
        "THP_MEM_ALLOC_ENABLE": "1",
    }


def ops_of(plan: Plan) -> tuple[str, ...]:
    """Builders of the ops that DeepSpeed compiles for a rank alone: none for communication."""
    cluster = plan.cluster.model_copy(update={"device": "cuda"})
    return needed_ops(plan.model_copy(update={"cluster": cluster}))


def _run(plan: Plan, rank: int, run: Path, *, compute: bool, on_metrics: OnMetrics) -> dict[str, float]:
    """Run the rank in a process of its own; the seconds of its phases."""
    seconds: dict[str, float] = {}

    def take(line: Mapping[str, Any]) -> None:
        seconds.update(line.get("seconds", {}))
        on_metrics(line)

    command = [sys.executable, "-m", "translution.cli", "rehearse-rank", str(run.resolve())]
    exit_code = run_ranks(command + ["--compute"] * compute, environment(plan, rank, compute=compute), run, take)
    raise_unless_finished(run, [rank], exit_code)
    return seconds


def _measured(run: Path, rank: int) -> MemoryMeasurement:
    measured = read_memory(run, rank)
    if measured is None:
        raise RunFailedError(f"rank {rank} measured nothing (run: {run})")
    return measured


def rehearse(
    plan_folder: Path,
    rank: int,
    *,
    layers: int | None = None,
    run: Path | None = None,
    nvme_path: str | None = None,
    compute: bool = False,
    on_metrics: OnMetrics = lambda _: None,
    on_stage: OnStage = lambda _: None,
) -> tuple[Rehearsal, Path]:
    """Run one rank of a plan alone on this machine and measure its memory.

    Args:
        plan_folder: as `translution plan` writes it.
        rank: of the planned world.
        layers: run a model of so many layers, and one of a layer less, and extrapolate; None runs all.
        run: the run folder to make; None takes the plan folder's next ``runs/NNN``.
        nvme_path: a folder of this machine instead of the plan's.
        compute: compute the matrix products too.
        on_metrics: called with a mapping when a phase begins.
        on_stage: called with a line for people when something slow begins.

    Returns:
        What was found, and the run folder that holds it.

    Raises:
        InputError: for a bad argument, or a machine with too little room.
        RunFailedError: if the rank did not finish.
    """
    plan = _with_nvme_path(load_plan(plan_folder), nvme_path)
    whole = layers is None or layers == plan.model.depth
    shown = plan if layers is None else with_layers(plan, layers)
    check(shown, rank)
    run = new_run_folder(plan_folder, run)
    if ops_of(plan):
        on_stage("preparing DeepSpeed's ops for offload, which the first run compiles in some minutes")
        prepare_ops(ops_of(plan), environment(plan, rank, compute=compute), run / LOG)
    measured: dict[int, MemoryMeasurement] = {}
    seconds: dict[int, dict[str, float]] = {}
    for part in [shown] if whole else [shown, _cut(plan, shown.model.depth - 1)]:
        count = part.model.depth
        on_stage(f"rehearsing rank {rank} of {plan.cluster.world_size} with {format_layers(count)}")
        folder = run if whole else run / f"layers_{count}"
        folder.mkdir(exist_ok=True)
        write_text(folder / PLAN, part.model_dump_json(indent=2) + "\n")
        make_run_folders(folder, folder)
        seconds[count] = _run(part, rank, folder, compute=compute, on_metrics=on_metrics)
        measured[count] = _measured(folder, rank)
    groups = {count: largest_sub_group(_cut(plan, count)) for count in (*measured, plan.model.depth)}
    found = measured[shown.model.depth] if whole else extrapolate(measured, groups, plan.model.depth)
    rehearsal = Rehearsal(
        plan=f"{plan.model.name} on {plan.cluster.name}",
        rank=rank,
        ranks=plan.cluster.world_size,
        depth=plan.model.depth,
        layers=shown.model.depth,
        computed=compute,
        planned_bytes={tier: plan.prediction.highest(tier) for tier in plan.prediction.tiers},
        prediction=predict(plan),
        measurement=join_init(found),
        measured_layers=measured,
        seconds=seconds,
        made=provenance(shlex.join(["translution", *sys.argv[1:]]), ("torch", "deepspeed")),
    )
    write_text(run / REHEARSAL, rehearsal.model_dump_json(indent=2) + "\n")
    return rehearsal, run
