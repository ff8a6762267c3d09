"""Writes the plan folder: ``plan.json``, ``ds_config.json``, a README, and scripts that launch the plan.

The scripts start ranks on one node, on ssh hosts, through torchrun or in a Slurm job; `cluster_files` has those for
Kubernetes and SkyPilot. All values of a plan are quoted.
Sources: DeepSpeed 0.19.8, launcher/runner.py (hostfile, exported variables). Slurm's srun sets its own task numbers,
from which job.sbatch sets the variables that DeepSpeed reads.
"""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

from ..common.files import new_folder
from ..common.units import format_bytes, format_count, format_flops
from ..config.model_base import OPERATOR_LABELS
from ..costs.parameters import count_parameters
from ..costs.workload import count_flops
from ..deepspeed.frameworks import ACCELERATE_FILE, TRAINER_CONFIG_FILE, accelerate_config, trainer_config
from ..hardware.cluster import ClusterSpec
from .cluster_files import JOBSET_FILE, SKYPILOT_FILE, jobset, skypilot_task
from .fsdp2_script import FSDP2_SCRIPT_FILE, fsdp2_script
from .plan import PLAN_FILE, Plan, dump_plan

RUNS = "runs"

_LAUNCH = """#!/bin/sh
# Runs the plan in this folder. Arguments are passed on: try ./launch.sh --dry-run
set -eu
here=$(CDPATH= cd -- "$(dirname -- "$0")" && pwd)
exec translution launch "$here" "$@"
"""


def memory_table(plan: Plan) -> str:
    """Return the predicted memory of a rank as Markdown: peaks by phase and tier, then each tier's highest peak."""
    prediction = plan.prediction
    tiers = prediction.tiers
    lines = [f"| phase | {' | '.join(tiers)} |", f"|---|{'--:|' * len(tiers)}"]
    for phase in dict.fromkeys(peak.phase for peak in prediction.peaks):
        lines.append(f"| {phase} | {' | '.join(format_bytes(prediction.bytes_of(phase, tier)) for tier in tiers)} |")
    for tier in tiers:
        worst = prediction.worst(tier)
        assert worst is not None
        lines += ["", f"### {tier}: {format_bytes(worst.bytes)} in {worst.phase}, at {worst.site}", ""]
        lines += ["| what | bytes | | how it is counted | source |", "|---|--:|--:|---|---|"]
        for entry in worst.breakdown:
            size = f"{entry.bytes} | {format_bytes(entry.bytes)}"
            lines.append(f"| {entry.name} | {size} | {entry.formula} | {entry.source} |")
        lines.append(f"| **total** | {worst.bytes} | {format_bytes(worst.bytes)} | | |")
    return "\n".join(lines)


def time_table(plan: Plan) -> str:
    """Return the predicted time of a step as Markdown; an empty text if the cluster lacks a rate."""
    time = plan.time
    if time is None:
        return ""
    lines = [
        "",
        "## Predicted time of a step",
        "",
        "| part | seconds | from | to | waits for |",
        "|---|--:|--:|--:|---|",
    ]
    for entry in time.breakdown:
        overlap = ", overlaps computation" if entry.overlaps else ""
        figures = f"{entry.likely_s:.3g} | {entry.low_s:.3g} | {entry.high_s:.3g}"
        lines.append(f"| {entry.name} | {figures} | {entry.bound}{overlap} |")
    lines.append(f"| **step** | {time.likely_s:.3g} | {time.low_s:.3g} | {time.high_s:.3g} | {time.bound} |")
    lines += ["", f"{time.samples_per_s:.3g} samples per second, {time.mfu:.1%} of the devices' peak."]
    return "\n".join(lines) + "\n"


def _how_to_run(plan: Plan) -> str:
    """Return how a plan is run, and what its files are, as Markdown."""
    clouds = (
        f"- `{JOBSET_FILE}` runs it on Kubernetes, `{SKYPILOT_FILE}` on the clouds of SkyPilot; their heads say how"
    )
    if plan.zero.uses_fsdp2:
        return f"""## Run it

    ./launch-torchrun.sh    # on every node, with NODE_RANK and MASTER_ADDR if there are several

Each run gets its own folder under `{RUNS}/` with metrics and checkpoints of torch.distributed.checkpoint. The script
does not evaluate, and does not measure memory.

## Files

- `{PLAN_FILE}` the complete plan, which the script reads
- `{FSDP2_SCRIPT_FILE}` trains it with torch's FSDP2; change it as you like
- `launch-torchrun.sh` starts that through torchrun
{clouds}
- `environment.sh` environment variables of every rank
"""
    others = f"`{TRAINER_CONFIG_FILE}` the same for Hugging Face's Trainer, `{ACCELERATE_FILE}` for `accelerate launch`"
    others = "" if plan.parallel.relation > 1 else f"- {others}\n"
    several, script, command = "", "launch.sh", "launch FOLDER"
    if plan.cluster.nodes > 1:
        several = ", `launch-ssh.sh` on the hosts that `hostfile` names"
        script, command = "launch-ssh.sh", "launch FOLDER --hostfile FOLDER/hostfile"
    return f"""## Run it

    ./{script}              # or: translution {command}
    ./{script} --dry-run    # prints the DeepSpeed command and starts nothing
    translution verify {RUNS}/001

Each run gets its own folder under `{RUNS}/` with metrics, logs, measured memory and a checkpoint.

## Files

- `{PLAN_FILE}` the complete plan, the only file that the ranks read
- `ds_config.json` its DeepSpeed configuration, for your own training script
{others}- `launch.sh` starts the run on one node{several}
- `launch-torchrun.sh` starts it through torchrun, `job.sbatch` through Slurm
{clouds}
- `environment.sh` environment variables of every rank
"""


def _sharding(plan: Plan) -> str:
    run = plan.run_config
    if run.parallel.relation == 1:
        return plan.zero.name
    return (
        f"relation parallelism in groups of {run.parallel.relation} ranks, which share out the relations, and "
        f"{plan.zero.name} over {run.replicas} replica(s)"
    )


def folder_readme(plan: Plan) -> str:
    """Return the README of a plan folder."""
    model, training, cluster = plan.model, plan.training, plan.cluster
    flops, label = count_flops(model), OPERATOR_LABELS[model.operator]
    tile = "whole tables" if plan.tile_relations is None else f"{plan.tile_relations} relations per tile"
    return f"""# Plan: {model.name} on {cluster.name}

Made by {plan.made_by}. {model.family} with {format_count(count_parameters(model).total)} parameters
({label}, {tile}), {cluster.nodes} node(s) of {cluster.ranks_per_node} rank(s) on {cluster.device},
{_sharding(plan)}, {training.precision_text}, {training.micro_batch} samples per rank and micro-batch,
{training.global_batch(cluster.world_size)} per step, {training.steps} steps,
{format_flops(flops.training_step * training.global_batch(cluster.world_size))} of matrix products per step.

{_how_to_run(plan)}
## Predicted memory of one rank

{memory_table(plan)}

The device of a rank has {format_bytes(cluster.device_memory_bytes)}. The libraries of the process and the data set
are not counted.
{time_table(plan)}"""


def _configurations(plan: Plan) -> dict[str, str]:
    """Return the files for DeepSpeed and what builds on it, by name."""
    config = plan.deepspeed_config()
    own = {"ds_config.json": json.dumps(config, indent=2) + "\n"}
    if plan.parallel.relation > 1:
        return own  # Trainer and Accelerate make no groups of ranks.
    return own | {
        TRAINER_CONFIG_FILE: json.dumps(trainer_config(config), indent=2) + "\n",
        ACCELERATE_FILE: accelerate_config(plan.cluster, plan.zero.stage),
    }


def write_plan_folder(plan: Plan, target: Path, *, force: bool = False, notes: str = "") -> None:
    """Write a complete plan folder, or nothing.

    Args:
        plan: the plan.
        target: the folder to create.
        force: write into an existing plan folder; its runs stay as they are.
        notes: Markdown that ends the folder's README, such as the reasons of a search.

    Raises:
        InputError: if the folder exists and ``force`` is false, is no plan folder, or cannot be written.
    """
    with new_folder(target, marker=PLAN_FILE, force=force) as folder:
        (folder / PLAN_FILE).write_text(dump_plan(plan), encoding="utf-8")
        (folder / "README.md").write_text(folder_readme(plan) + notes, encoding="utf-8")
        files = launch_files(plan)
        if not plan.zero.uses_fsdp2:
            files |= {"launch.sh": _LAUNCH, **_configurations(plan)}
        for name, text in files.items():
            (folder / name).write_text(text, encoding="utf-8")
            if name.endswith((".sh", ".sbatch")) and name != "environment.sh":
                (folder / name).chmod(0o755)


PORT = 29500
_HEAD = """#!/bin/sh
# {what}
set -eu
here=$(CDPATH= cd -- "$(dirname -- "$0")" && pwd)
. "$here/environment.sh"
"""
_RUN = """# The run folder, visible to all nodes: the argument, or the next runs/NNN of this plan.
run=${1:-}
if [ -z "$run" ]; then
    number=1
    while [ -e "$here/runs/$(printf %03d "$number")" ]; do number=$((number + 1)); done
    run=$here/runs/$(printf %03d "$number")
fi
"""


HUGE_PAGES = {"THP_MEM_ALLOC_ENABLE": "1"}
"""Makes torch ask for huge pages for tensors of 2 MiB or more in host memory.

A tile's blocks are mapped anew at every use, and with huge pages that takes a fraction of the page faults.

Source: torch 2.13, c10/core/impl/alloc_cpu.cpp.
"""


def environment_variables(cluster: ClusterSpec) -> dict[str, str]:
    """Environment variables that every rank needs, whatever starts it."""
    cores = cluster.host_cores or cluster.ranks_per_node
    # torchrun would set one thread, and the CPU optimizer would be slower by the number of cores.
    variables = {"OMP_NUM_THREADS": str(max(1, cores // cluster.ranks_per_node)), **HUGE_PAGES}
    if cluster.device == "cpu":
        return {"DS_ACCELERATOR": "cpu"} | variables
    return variables | {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:False", "DEEPSPEED_TIMEOUT": "60"}


def environment_script(plan: Plan) -> str:
    """Return ``environment.sh``, which every other script reads; it keeps variables that are already set."""
    lines = ["# The scripts of this folder read this file. Variables that are already set keep their values."]
    for name, value in environment_variables(plan.cluster).items():
        lines.append(f"export {name}=${{{name}:-{shlex.quote(value)}}}")
    lines += [
        "# Network interface of the ranks, if the default is wrong:",
        "# export NCCL_SOCKET_IFNAME=eth0 GLOO_SOCKET_IFNAME=eth0",
        "# Folder of DeepSpeed's compiled ops, on each node's own disk:",
        "# export TORCH_EXTENSIONS_DIR=/tmp/torch_extensions",
    ]
    if plan.zero.uses_nvme:
        lines += ["# End the run if a value changes on an NVMe drive:", "# export TRANSLUTION_CHECK_SWAP=1"]
    return "\n".join(lines) + "\n"


def hostfile(cluster: ClusterSpec) -> str:
    """Return a hostfile with a placeholder name for every node."""
    lines = ["# One line per node; all nodes connect to the first one. Replace the names by your hosts' names."]
    lines += [f"node{number} slots={cluster.ranks_per_node}" for number in range(1, cluster.nodes + 1)]
    return "\n".join(lines) + "\n"


_SSH = (
    _HEAD.format(
        what="Run this on one node, with your hosts' names in hostfile. It starts all ranks through ssh and pdsh."
    )
    + """exec translution launch "$here" --hostfile "$here/hostfile" "$@"
"""
)


def torchrun_script(cluster: ClusterSpec, script: str | None = None) -> str:
    """Return ``launch-torchrun.sh``, which runs once on every node.

    Args:
        cluster: gives the numbers of nodes and ranks.
        script: the training script in the plan folder; None is ``translution train``.
    """
    program = '--module translution.cli train "$here"' if script is None else f'"$here/{script}"'
    what = "Run this on every node: NODE_RANK=0 MASTER_ADDR=first-host ./launch-torchrun.sh RUN_FOLDER; ranks from 0."
    if cluster.nodes == 1:
        what = "Starts all ranks of this node through torchrun."
    needed = "" if cluster.nodes == 1 else ': "${NODE_RANK:?is required}" "${MASTER_ADDR:?is required}"\n'
    return (
        _HEAD.format(what=what)
        + _RUN
        + needed
        + f"""exec torchrun --nnodes {cluster.nodes} --nproc_per_node {cluster.ranks_per_node} \\
    --node_rank "${{NODE_RANK:-0}}" --master_addr "${{MASTER_ADDR:-127.0.0.1}}" \\
    --master_port "${{MASTER_PORT:-{PORT}}}" {program} "$run"
"""
    )


def slurm_script(plan: Plan) -> str:
    """Return ``job.sbatch``, with one task per rank."""
    cluster = plan.cluster
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", plan.model.name)[:60]
    cores = max(1, (cluster.host_cores or cluster.ranks_per_node) // cluster.ranks_per_node)
    gpus = f"#SBATCH --gpus-per-node={cluster.ranks_per_node}\n" if cluster.device == "cuda" else ""
    return f"""#!/bin/bash
# Submit from this folder: sbatch job.sbatch. Add your account, partition and time.
# Before the job's time limit the ranks save and end; sbatch job.sbatch RUN_FOLDER resumes that run.
# TRANSLUTION_FORCE=1 starts the ranks even if preflight finds a problem on a node.
#SBATCH --job-name={name}
#SBATCH --nodes={cluster.nodes}
#SBATCH --ntasks-per-node={cluster.ranks_per_node}
#SBATCH --cpus-per-task={cores}
{gpus}#SBATCH --signal=USR1@120
#SBATCH --output=slurm-%j.log
set -eu
here=${{SLURM_SUBMIT_DIR:-$(CDPATH= cd -- "$(dirname -- "$0")" && pwd)}}
. "$here/environment.sh"
run=${{1:-$here/runs/slurm-$SLURM_JOB_ID}}
MASTER_ADDR=${{MASTER_ADDR:-$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)}}
# Two jobs can share a node, so each gets its own port.
export MASTER_ADDR MASTER_PORT=${{MASTER_PORT:-$((20000 + SLURM_JOB_ID % 10000))}}

# Before the ranks start, every node reports its state and compiles missing ops.
reports=$(mktemp -d "$here/.preflight-XXXXXX")
trap 'rm -rf "$reports"' EXIT
srun --ntasks={cluster.nodes} --ntasks-per-node=1 translution preflight-node "$here" --out "$reports"
translution preflight "$here" --reports "$reports" ${{TRANSLUTION_FORCE:+--force}}
srun --ntasks={cluster.nodes} --ntasks-per-node=1 translution preflight-node "$here" --compile

# DeepSpeed reads these variables; srun sets only its own.
# shellcheck disable=SC2016
srun --kill-on-bad-exit=1 sh -c '
    export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
    exec translution train "$1" "$2"' rank "$here" "$run" || echo "srun ended with $?"
# The job has succeeded if every rank has finished.
translution status "$run"
"""


def launch_files(plan: Plan) -> dict[str, str]:
    """Return the launch files by name; those that end in .sh or .sbatch are executable."""
    cluster = plan.cluster
    files = {
        "environment.sh": environment_script(plan),
        "launch-torchrun.sh": torchrun_script(cluster, FSDP2_SCRIPT_FILE if plan.zero.uses_fsdp2 else None),
        JOBSET_FILE: jobset(plan),
        SKYPILOT_FILE: skypilot_task(plan),
    }
    if plan.zero.uses_fsdp2:
        return files | {FSDP2_SCRIPT_FILE: fsdp2_script()}
    files["job.sbatch"] = slurm_script(plan)
    if cluster.nodes > 1:
        files |= {"hostfile": hostfile(cluster), "launch-ssh.sh": _SSH}
    return files
