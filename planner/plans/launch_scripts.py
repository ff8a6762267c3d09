"""Files that start a plan: one node, ssh hosts, torchrun on every node, or a Slurm job.

Sources: DeepSpeed 0.19.8, launcher/runner.py (hostfile, exported variables); Slurm's srun, whose tasks DeepSpeed does
not number by itself. Nothing of a plan stands in them unquoted.
"""

from __future__ import annotations

import re
import shlex

from ..hardware.cluster import ClusterSpec
from .plan import Plan

PORT = 29500
_HEAD = """#!/bin/sh
# {what}
set -eu
here=$(cd "$(dirname "$0")" && pwd)
. "$here/environment.sh"
"""
_RUN = """# The run folder, which all nodes see: the argument, or the next of this plan's.
run=${1:-}
if [ -z "$run" ]; then
    number=1
    while [ -e "$here/runs/$(printf %03d "$number")" ]; do number=$((number + 1)); done
    run=$here/runs/$(printf %03d "$number")
fi
"""


def environment_variables(cluster: ClusterSpec) -> dict[str, str]:
    """What every rank needs in its environment, whatever starts it."""
    cores = cluster.host_cores or cluster.ranks_per_node
    # torchrun would set one thread, with which the host's optimizer takes as many times as long.
    variables = {"OMP_NUM_THREADS": str(max(1, cores // cluster.ranks_per_node))}
    if cluster.device == "cpu":
        return {"DS_ACCELERATOR": "cpu"} | variables
    return variables | {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:False", "DEEPSPEED_TIMEOUT": "60"}


def environment_script(cluster: ClusterSpec) -> str:
    """``environment.sh``, read by every other script; what is set already stays."""
    lines = ["# Read by the scripts of this folder. What your environment sets already stays as it is."]
    for name, value in environment_variables(cluster).items():
        lines.append(f"export {name}=${{{name}:-{shlex.quote(value)}}}")
    lines += [
        "# Which network interface the ranks talk over, where the default is the wrong one:",
        "# export NCCL_SOCKET_IFNAME=eth0 GLOO_SOCKET_IFNAME=eth0",
        "# Where DeepSpeed's compiled ops lie: a folder on each node's own disk.",
        "# export TORCH_EXTENSIONS_DIR=/tmp/torch_extensions",
    ]
    return "\n".join(lines) + "\n"


def hostfile(cluster: ClusterSpec) -> str:
    """A hostfile with a name to replace for every node."""
    lines = ["# One line for each node, the first one of which the others meet at: put your hosts' names here."]
    lines += [f"node{number} slots={cluster.ranks_per_node}" for number in range(1, cluster.nodes + 1)]
    return "\n".join(lines) + "\n"


_SSH = (
    _HEAD.format(what="Run on one node, with your hosts' names in hostfile: starts all ranks through ssh and pdsh.")
    + """exec translution launch "$here" --hostfile "$here/hostfile" "$@"
"""
)


def torchrun_script(cluster: ClusterSpec) -> str:
    """``launch-torchrun.sh``: run once on every node."""
    what = "Run on every node: NODE_RANK=0 MASTER_ADDR=first-host ./launch-torchrun.sh RUN_FOLDER, NODE_RANK from 0."
    if cluster.nodes == 1:
        what = "Starts all ranks of this node through torchrun."
    needed = "" if cluster.nodes == 1 else ': "${NODE_RANK:?is required}" "${MASTER_ADDR:?is required}"\n'
    return (
        _HEAD.format(what=what)
        + _RUN
        + needed
        + f"""exec torchrun --nnodes {cluster.nodes} --nproc_per_node {cluster.ranks_per_node} \\
    --node_rank "${{NODE_RANK:-0}}" --master_addr "${{MASTER_ADDR:-127.0.0.1}}" \\
    --master_port "${{MASTER_PORT:-{PORT}}}" --module translution.cli train "$here" "$run"
"""
    )


def slurm_script(plan: Plan) -> str:
    """``job.sbatch``: one task for each rank."""
    cluster = plan.cluster
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", plan.model.name)[:60]
    cores = max(1, (cluster.host_cores or cluster.ranks_per_node) // cluster.ranks_per_node)
    gpus = f"#SBATCH --gpus-per-node={cluster.ranks_per_node}\n" if cluster.device == "cuda" else ""
    return f"""#!/bin/bash
# Submit from this folder: sbatch job.sbatch. Add your account, partition and time.
# Before the job's limit the ranks save and end: sbatch job.sbatch RUN_FOLDER goes on with what it left.
# TRANSLUTION_FORCE=1 starts the ranks although a node lacks something.
#SBATCH --job-name={name}
#SBATCH --nodes={cluster.nodes}
#SBATCH --ntasks-per-node={cluster.ranks_per_node}
#SBATCH --cpus-per-task={cores}
{gpus}#SBATCH --signal=USR1@120
#SBATCH --output=slurm-%j.log
set -eu
here=${{SLURM_SUBMIT_DIR:-$(cd "$(dirname "$0")" && pwd)}}
. "$here/environment.sh"
run=${{1:-$here/runs/slurm-$SLURM_JOB_ID}}
MASTER_ADDR=${{MASTER_ADDR:-$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)}}
# Two jobs may share a node.
export MASTER_ADDR MASTER_PORT=${{MASTER_PORT:-$((20000 + SLURM_JOB_ID % 10000))}}

# Every node says how it is and compiles what it lacks before the ranks start.
reports=$(mktemp -d "$here/.preflight-XXXXXX")
trap 'rm -rf "$reports"' EXIT
srun --ntasks={cluster.nodes} --ntasks-per-node=1 translution preflight-node "$here" --out "$reports"
translution preflight "$here" --reports "$reports" ${{TRANSLUTION_FORCE:+--force}}
srun --ntasks={cluster.nodes} --ntasks-per-node=1 translution preflight-node "$here" --compile

# DeepSpeed reads its place in the world from these; srun sets only its own.
# shellcheck disable=SC2016
srun --kill-on-bad-exit=1 sh -c '
    export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
    exec translution train "$1" "$2"' rank "$here" "$run" || echo "srun ended with $?"
# The job has done its work if every rank has finished.
translution status "$run"
"""


def launch_files(plan: Plan) -> dict[str, str]:
    """The files that start a plan, by name; those that end in .sh or .sbatch are programs."""
    cluster = plan.cluster
    files = {
        "environment.sh": environment_script(cluster),
        "launch-torchrun.sh": torchrun_script(cluster),
        "job.sbatch": slurm_script(plan),
    }
    if cluster.nodes > 1:
        files |= {"hostfile": hostfile(cluster), "launch-ssh.sh": _SSH}
    return files
