"""Writes a plan's files for Kubernetes and SkyPilot: ``jobset.yaml`` and ``skypilot.yaml``.

Both start ``launch-torchrun.sh`` once on every node, with the node's number and the first node's address. A YAML
library writes them, so that nothing in a plan can end a value. Sources: JobSet v1alpha2 (names of hosts), Kubernetes'
indexed Jobs (``JOB_COMPLETION_INDEX``), SkyPilot's task YAML (``SKYPILOT_NODE_RANK``, ``SKYPILOT_NODE_IPS``).
"""

from __future__ import annotations

import re
import shlex
from typing import Any

import yaml

from ..common.phases import Tier
from ..common.units import GIB
from ..costs.parameters import count_parameters
from ..hardware.cluster import ClusterSpec
from .fsdp2_script import FSDP2_SCRIPT_FILE
from .plan import Plan

JOBSET_FILE, SKYPILOT_FILE = "jobset.yaml", "skypilot.yaml"

_PROCESS_BYTES = 4 * GIB
"""Host memory that is requested for the libraries of a rank's process, which predictions leave out: an estimate."""
_SHARED_BYTES = GIB
"""Shared memory of a rank: NCCL's buffers of a rank take up to 652 MiB (`translution plan` prints them)."""
_CHECKPOINT_BYTES = 12
"""Bytes per parameter in a checkpoint: fp32 master copy and two moments."""
_SKYPILOT_GPUS = {
    "A100-40": "A100",
    "A100-PCIe-40": "A100",
    "A100-80": "A100-80GB",
    "A100-PCIe-80": "A100-80GB",
    "V100-16": "V100",
    "V100-32": "V100-32GB",
    "H100-PCIe": "H100",
    "H100-NVL": "H100",
    "GH200-96": "GH200",
    "GH200-144": "GH200",
}
"""SkyPilot's names of the catalog's GPUs, where they differ."""
_MOST_CHARACTERS = 40


def dns_name(text: str) -> str:
    """Return a name that Kubernetes and SkyPilot accept: lower-case letters, digits and hyphens, from a letter on.

    It has at most 40 characters, so that the host names that JobSet makes from it stay below the 63 of a DNS label
    (RFC 1123).
    """
    name = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
    name = name if name[:1].isalpha() else f"plan-{name}"
    return name[:_MOST_CHARACTERS].strip("-")


class _Dumper(yaml.SafeDumper):
    """Writes texts of several lines as blocks, and shares no node."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _write_text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _write_text)


def _document(comment: str, content: dict[str, Any]) -> str:
    lines = "".join(f"# {line}\n" for line in comment.splitlines())
    return lines + yaml.dump(content, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)


def _compile_ops(plan: Plan, folder: str) -> list[str]:
    """Return the command that compiles DeepSpeed's ops before ranks race for them."""
    return [] if plan.zero.uses_fsdp2 else [f"translution preflight-node {folder} --compile"]


def _nvme_folders(plan: Plan) -> list[str]:
    """Return the folders on each node's NVMe drive that the plan uses."""
    paths = (plan.zero.offload_optimizer.nvme_path, plan.zero.offload_param.nvme_path)
    return list(dict.fromkeys(str(path) for path in paths if path is not None)) if plan.zero.uses_nvme else []


def _requested_gib(plan: Plan) -> int:
    """Return the host memory that a node's ranks need, in GiB: the prediction, shared memory and libraries."""
    cluster = plan.cluster
    prediction = plan.prediction
    on_host = prediction.host_bytes + (prediction.peak_bytes if cluster.device == "cpu" else 0)
    per_rank = on_host + _SHARED_BYTES + _PROCESS_BYTES
    return min(-(-per_rank * cluster.ranks_per_node // GIB), max(1, cluster.host_memory_bytes // GIB))


def _requested_cores(cluster: ClusterSpec) -> int:
    """Return a node's cores less one, which Kubernetes' own processes need."""
    return max(1, (cluster.host_cores or cluster.ranks_per_node) - 1)


def _volumes(plan: Plan, name: str) -> list[tuple[str, dict[str, Any]]]:
    """Return where each volume is mounted, and the volume."""
    shared = f"{plan.cluster.ranks_per_node * _SHARED_BYTES // GIB}Gi"
    volumes: list[tuple[str, dict[str, Any]]] = [
        ("/plan", {"name": "plan", "configMap": {"name": name}}),
        ("/project", {"name": "project", "persistentVolumeClaim": {"claimName": "translution"}}),
        ("/dev/shm", {"name": "shared-memory", "emptyDir": {"medium": "Memory", "sizeLimit": shared}}),
    ]
    # A relative folder is in the working folder, /project in the image of the Dockerfile.
    for number, path in enumerate(path for path in _nvme_folders(plan) if path.startswith("/")):
        volumes.append((path, {"name": f"nvme-{number}", "hostPath": {"path": path, "type": "DirectoryOrCreate"}}))
    return volumes


def _container(plan: Plan, name: str, volumes: list[tuple[str, dict[str, Any]]]) -> dict[str, Any]:
    cluster = plan.cluster
    limits: dict[str, Any] = {"memory": f"{max(1, cluster.host_memory_bytes // GIB)}Gi"}
    if cluster.device == "cuda":
        vendor = "amd" if (cluster.gpu or "").startswith("MI") else "nvidia"
        limits[f"{vendor}.com/gpu"] = cluster.ranks_per_node
    command = [
        'export NODE_RANK="$JOB_COMPLETION_INDEX"',
        *_compile_ops(plan, "/plan"),
        'exec sh /plan/launch-torchrun.sh "$RUN"\n',
    ]
    return {
        "name": "ranks",
        "image": "translution",
        "command": ["sh", "-euc", "\n".join(command)],
        "env": [
            {"name": "RUN", "value": f"/project/runs/{name}"},
            {"name": "MASTER_ADDR", "value": f"{name}-ranks-0-0.{name}"},
        ],
        "resources": {
            "requests": {"cpu": _requested_cores(cluster), "memory": f"{_requested_gib(plan)}Gi"},
            "limits": limits,
        },
        # Locks the buffers of NVMe drives and of network adapters in memory.
        "securityContext": {"capabilities": {"add": ["IPC_LOCK"]}},
        "volumeMounts": [{"name": volume["name"], "mountPath": path} for path, volume in volumes],
    }


def jobset(plan: Plan) -> str:
    """Return ``jobset.yaml``, a JobSet with a pod for each node; all pods start again, and resume, if one fails."""
    name, volumes = dns_name(plan.model.name), _volumes(plan, dns_name(plan.model.name))
    pod = {
        "restartPolicy": "Never",
        # A rank that is asked to end finishes its step and saves.
        "terminationGracePeriodSeconds": 120,
        "containers": [_container(plan, name, volumes)],
        "volumes": [volume for _, volume in volumes],
    }
    nodes = plan.cluster.nodes
    job = {"completionMode": "Indexed", "completions": nodes, "parallelism": nodes, "backoffLimit": 0}
    content = {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {"name": name},
        "spec": {
            "network": {"enableDNSHostnames": True, "subdomain": name, "publishNotReadyAddresses": True},
            "failurePolicy": {"maxRestarts": 3},
            "replicatedJobs": [
                {"name": "ranks", "replicas": 1, "template": {"spec": {**job, "template": {"spec": pod}}}}
            ],
        },
    }
    comment = f"""A pod for each node. In the folder of this file:
    kubectl create configmap {name} --from-file=.
    kubectl apply --filename {JOBSET_FILE}
Set image to one with translution, and claimName to a volume that all nodes can write to; runs and data are on it.
A run that is in the volume already is resumed: set RUN to another folder for a new one."""
    return _document(comment, content)


def _skypilot_resources(plan: Plan) -> dict[str, Any]:
    cluster = plan.cluster
    state = _CHECKPOINT_BYTES * count_parameters(plan.model).total * (plan.training.keep_checkpoints + 1)
    resources: dict[str, Any] = {}
    if cluster.device == "cuda" and cluster.gpu is not None:
        resources["accelerators"] = {_SKYPILOT_GPUS.get(cluster.gpu, cluster.gpu): cluster.ranks_per_node}
    resources |= {"cpus": f"{cluster.host_cores or cluster.ranks_per_node}+", "memory": f"{_requested_gib(plan)}+"}
    if plan.zero.uses_nvme:
        needed = plan.prediction.highest(Tier.NVME) * cluster.ranks_per_node
        resources["local_disk"] = f"nvme:{-(-needed // 10**9)}+"
    return resources | {"disk_size": 100 + (-(-state // 10**9) if cluster.nodes == 1 else 0)}


def skypilot_task(plan: Plan) -> str:
    """Return ``skypilot.yaml``, a task that starts the ranks of every node; several nodes share a volume for runs."""
    name, cluster = dns_name(plan.model.name), plan.cluster
    files = ["plan.json", "environment.sh", "launch-torchrun.sh"]
    files += [FSDP2_SCRIPT_FILE] if plan.zero.uses_fsdp2 else []
    run = f"/project/runs/{name}" if cluster.nodes > 1 else f"~/runs/{name}"
    content: dict[str, Any] = {
        "name": name,
        "num_nodes": cluster.nodes,
        "resources": _skypilot_resources(plan),
        "file_mounts": {f"~/plan/{file}": f"./{file}" for file in files},
    }
    if cluster.nodes > 1:
        content["volumes"] = {"/project": "translution"}
    content["setup"] = (
        "sudo apt-get update && sudo apt-get install --yes g++ libaio-dev\npip install 'translution-scale[train]'\n"
    )
    folders = [f"mkdir -p {shlex.quote(path)}" for path in _nvme_folders(plan)]
    content["run"] = "\n".join(
        [
            "set -eu",
            'export NODE_RANK="$SKYPILOT_NODE_RANK" MASTER_ADDR=$(echo "$SKYPILOT_NODE_IPS" | head -n 1)',
            *folders,
            *_compile_ops(plan, "~/plan"),
            f"exec sh ~/plan/launch-torchrun.sh {run}\n",
        ]
    )
    comment = f"In the folder of this file: sky launch --cluster {name} {SKYPILOT_FILE}"
    if cluster.nodes > 1:
        comment += "\nAll nodes write to the volume translution; runs and data are on it (sky volumes apply)."
    if cluster.device == "cuda" and cluster.gpu is None:
        comment += f"\nThe plan does not name its GPU: add resources: accelerators: NAME:{cluster.ranks_per_node}"
    return _document(comment, content)
