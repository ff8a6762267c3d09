"""Rehearsals: run one rank of a planned world alone on this machine and measure its memory.

The rank runs in its own process (rehearsal_rank.py), which excludes the memory of this one. A rehearsal of some layers
runs twice, the second time with one layer less, and extrapolates linearly to the complete model.

    rehearsal.json          the measurement and the prediction
    layers_K/               the run folder of the rank with K layers, if the plan has more
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

from translution.planner.common import (
    GIB,
    InputError,
    Provenance,
    RunFailedError,
    Schema,
    Tier,
    available_memory_bytes,
    format_bytes,
    make_provenance,
    parse_json,
    write_text,
)
from translution.planner.config import ZeroSpec, override
from translution.planner.deepspeed import check_training_state
from translution.planner.hardware import local_cpu_cluster
from translution.planner.memory import MemoryEstimate, summarize_simulation
from translution.planner.plans import PLAN_FILE, Plan, dump_plan, load_plan
from translution.planner.simulator import simulate
from translution.planner.simulator.engine import EngineConfig

from ..launcher.local_processes import OnMetrics, run_ranks
from ..runs.folder import LOG, make_run_folders, new_run_folder
from ..runs.measurement import MemoryMeasurement, read_memory
from ..runs.verdict import raise_unless_finished
from ..system.compiled_ops import OnMessage, needed_ops, prepare_ops
from ..system.environment import check_packages, launch_environment
from .extrapolate import extrapolate, join_init, largest_sub_group

REHEARSAL = "rehearsal.json"
PROCESS_BYTES = GIB
"""Bytes reserved for the process itself: libraries and the trace of a measured step."""


class Rehearsal(Schema):
    """The result of a rehearsal: the rank's values were meaningless, its allocations real."""

    plan: str
    """Names of the model and the cluster."""
    rank: int
    ranks: int
    depth: int
    """Number of layers of the plan's model."""
    layers: int
    """Number of layers that were run; if below `depth`, the measurement is extrapolated from them."""
    computed: bool
    """Whether matrix products were computed, not only allocated."""
    planned_bytes: dict[str, int]
    """Predicted peak in bytes of each memory tier of the planned rank."""
    prediction: MemoryEstimate
    """Predicted memory of the rehearsed rank: all tiers are host memory, without the overhead of a real backend."""
    measurement: MemoryMeasurement
    """Measurement of the complete model, extrapolated if fewer layers were run."""
    measured_layers: dict[int, MemoryMeasurement]
    """Measurements by number of layers."""
    seconds: dict[int, dict[str, float]]
    """Seconds of each phase of the last step and of the rehearsal (`all`), by number of layers."""
    made: Provenance

    @property
    def extrapolated(self) -> bool:
        """True if the measurement is extrapolated from fewer layers."""
        return self.layers < self.depth


_REHEARSAL: TypeAdapter[Rehearsal] = TypeAdapter(Rehearsal)


def format_layers(count: int) -> str:
    """Format a number of layers: ``1 layer``, ``2 layers``."""
    return f"{count} layer{'s' * (count != 1)}"


def read_rehearsal(run: Path) -> Rehearsal | None:
    """Read the rehearsal of a run folder; None if it has none."""
    path = run / REHEARSAL
    return parse_json(_REHEARSAL, path.read_bytes(), str(path)) if path.is_file() else None


def predict_rehearsal(plan: Plan, rank: int = 0) -> MemoryEstimate:
    """Predict the memory of a plan's rank as it is rehearsed, on a CPU where all tiers are host memory.

    Args:
        plan: the plan.
        rank: number of the rank; only its place in a group that shares out the relations matters.
    """
    replayed = simulate(plan.run_config, rehearsed=True, place=rank % plan.parallel.relation)
    return summarize_simulation(replayed, EngineConfig(plan.run_config), None)


def with_layers(plan: Plan, layers: int) -> Plan:
    """Return the plan for a model with another number of layers; its ZeRO settings stay the same.

    Raises:
        InputError: if the number is out of range, or the layers differ, so that they cannot be extrapolated.
    """
    depth = plan.model.depth
    if not 2 <= layers <= depth:
        raise InputError(f"layers: {layers} is not allowed: must be from 2 to {depth}, the layers of the plan")
    if len(set(plan.model.layer_operators)) > 1:
        raise InputError(f"layers: {layers} is not allowed: the layers of {plan.model.name} differ; rehearse them all")
    return _change_depth(plan, layers)


def _change_depth(plan: Plan, layers: int) -> Plan:
    if layers == plan.model.depth:
        return plan
    plan = plan.model_copy(update={"model": override(plan.model, depth=layers, relative_layers="all")})
    return plan.model_copy(update={"prediction": predict_rehearsal(plan)})


def _with_nvme_path(plan: Plan, path: str | None) -> Plan:
    """Return the plan with another NVMe folder; check the folder."""
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


def check_rehearsal(plan: Plan, rank: int) -> None:
    """Check that this machine can rehearse a rank.

    Raises:
        InputError: if the rank does not exist, DeepSpeed does not run the optimizer on a CPU, or memory or NVMe are too
            small.
        MissingPackageError: if torch or DeepSpeed is not installed.
    """
    ranks = plan.cluster.world_size
    if not 0 <= rank < ranks:
        raise InputError(f"rank: {rank} is not allowed: must be from 0 to {ranks - 1}")
    check_training_state(plan.training, plan.zero, "cpu")
    prediction = predict_rehearsal(plan, rank)
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
    check_packages(rehearsal_ops(plan))


def rank_environment(plan: Plan, rank: int, *, compute: bool) -> dict[str, str]:
    """Return the environment variables of the rank.

    Without products to compute it has one thread: it makes thousands of small copies, which several threads would slow
    down.
    """
    return {
        **launch_environment(local_cpu_cluster(1)),
        **({} if compute else {"OMP_NUM_THREADS": "1"}),
        "RANK": str(rank),
        "LOCAL_RANK": "0",
        "WORLD_SIZE": str(plan.cluster.world_size),
        # DeepSpeed requires them; the fake process group does not use them.
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29500",
        # Use huge pages: touching new memory in pages of 4 KiB would take half of the time.
        "THP_MEM_ALLOC_ENABLE": "1",
    }


def rehearsal_ops(plan: Plan) -> tuple[str, ...]:
    """Builders of the ops that DeepSpeed compiles for the rank; none for communication."""
    changes: dict[str, object] = {
        "cluster": plan.cluster.model_copy(update={"device": "cuda"}),
        "training": plan.training.model_copy(update={"adam": "auto"}),
    }
    return needed_ops(plan.model_copy(update=changes))


def _run(plan: Plan, rank: int, run: Path, *, compute: bool, on_metrics: OnMetrics) -> dict[str, float]:
    """Run the rank in its own process; return the seconds of its phases."""
    seconds: dict[str, float] = {}

    def take(line: Mapping[str, Any]) -> None:
        seconds.update(line.get("seconds", {}))
        on_metrics(line)

    command = [sys.executable, "-m", "translution.cli", "rehearse-rank", str(run.resolve())]
    exit_code = run_ranks(command + ["--compute"] * compute, rank_environment(plan, rank, compute=compute), run, take)
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
    on_message: OnMessage = lambda _: None,
) -> tuple[Rehearsal, Path]:
    """Run one rank of a plan alone on this machine and measure its memory.

    Args:
        plan_folder: as `translution plan` writes it.
        rank: number of the rank in the planned world.
        layers: run a model with this number of layers and one with a layer less, and extrapolate; None runs all layers.
        run: the run folder to make; None makes the plan folder's next ``runs/NNN``.
        nvme_path: an NVMe folder of this machine, instead of the plan's.
        compute: whether to compute matrix products instead of only allocating their results.
        on_metrics: called with a mapping when a phase begins.
        on_message: called with a line of text when something slow begins.

    Returns:
        The result, and the run folder that holds it.

    Raises:
        InputError: for an invalid argument, or if the machine's memory or drive is too small.
        RunFailedError: if the rank did not finish.
    """
    plan = _with_nvme_path(load_plan(plan_folder), nvme_path)
    plan.require_deepspeed()
    all_layers = layers is None or layers == plan.model.depth
    shown = plan if layers is None else with_layers(plan, layers)
    check_rehearsal(shown, rank)
    run = new_run_folder(plan_folder, run)
    if rehearsal_ops(plan):
        prepare_ops(rehearsal_ops(plan), rank_environment(plan, rank, compute=compute), run / LOG, on_message)
    measured: dict[int, MemoryMeasurement] = {}
    seconds: dict[int, dict[str, float]] = {}
    for part in [shown] if all_layers else [shown, _change_depth(plan, shown.model.depth - 1)]:
        count = part.model.depth
        on_message(f"rehearsing rank {rank} of {plan.cluster.world_size} with {format_layers(count)}")
        folder = run if all_layers else run / f"layers_{count}"
        folder.mkdir(exist_ok=True)
        write_text(folder / PLAN_FILE, dump_plan(part))
        make_run_folders(folder, folder)
        seconds[count] = _run(part, rank, folder, compute=compute, on_metrics=on_metrics)
        measured[count] = _measured(folder, rank)
    groups = {count: largest_sub_group(_change_depth(plan, count), rank) for count in (*measured, plan.model.depth)}
    found = measured[shown.model.depth] if all_layers else extrapolate(measured, groups, plan.model.depth)
    rehearsal = Rehearsal(
        plan=f"{plan.model.name} on {plan.cluster.name}",
        rank=rank,
        ranks=plan.cluster.world_size,
        depth=plan.model.depth,
        layers=shown.model.depth,
        computed=compute,
        planned_bytes={tier: plan.prediction.highest(tier) for tier in plan.prediction.tiers},
        prediction=predict_rehearsal(plan, rank),
        measurement=join_init(found),
        measured_layers=measured,
        seconds=seconds,
        made=make_provenance(shlex.join(["translution", *sys.argv[1:]]), ("torch", "deepspeed")),
    )
    write_text(run / REHEARSAL, rehearsal.model_dump_json(indent=2) + "\n")
    return rehearsal, run
