"""The files for Kubernetes and SkyPilot: valid by their schemas for any plan, with the cluster's sizes, and started."""

from __future__ import annotations

import importlib
import itertools
import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from translution.planner.config.loading import preset
from translution.planner.config.training import TrainingSpec
from translution.planner.hardware.catalog import load_catalog
from translution.planner.hardware.cluster import ClusterSpec, load_cluster, local_cpu_cluster
from translution.planner.plans.build import make_plan
from translution.planner.plans.cluster_files import dns_name, jobset, skypilot_task
from translution.planner.plans.folder import write_plan_folder
from translution.planner.plans.plan import Plan

NVME = "/mnt/nv'me $(x): 1"
NAMES = [
    "",
    "ViT/16",
    "0",
    "-",
    "яблоко",
    "x'; touch `id`: {a}",
    "a" * 300,
    "#comment",
    "null",
    "yes",
    "1e3",
    "a\u0301b",
]


def make(cluster: ClusterSpec, name: str = "vit-base/16", **options: Any) -> Plan:
    training = TrainingSpec(precision="fp32" if cluster.device == "cpu" else "bf16", data="synthetic", micro_batch=1)
    model = preset("vit-tiny/56" if cluster.device == "cpu" else "vit-base/16")
    return make_plan(model.model_copy(update={"name": name}), cluster, training, **options)


@pytest.fixture(scope="module")
def two_nodes() -> Plan:
    return make(load_cluster("2x8xH100"), offload="nvme", nvme_path=NVME)


def check(root: Path, kind: str, text: str) -> Any:
    """Return the content of a file that its schema accepts."""
    content = yaml.safe_load(text)
    schema = json.loads((root / "tests" / "data" / "schemas" / f"{kind}.json").read_text())
    importlib.import_module("jsonschema").validate(content, schema)
    return content


def pod_of(content: Any) -> Any:
    return content["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]


@pytest.mark.parametrize("name", NAMES)
def test_the_files_are_valid_for_any_name(name: str, two_nodes: Plan, root: Path) -> None:
    plan = two_nodes.model_copy(update={"model": two_nodes.model.model_copy(update={"name": name})})
    manifest, task = check(root, "jobset", jobset(plan)), check(root, "skypilot", skypilot_task(plan))
    assert manifest["metadata"]["name"] == task["name"] == dns_name(name)
    assert "touch `id`" not in jobset(plan) + skypilot_task(plan)


@given(text=st.text())
def test_a_name_is_a_dns_label_with_room_for_the_numbers_of_its_hosts(text: str) -> None:
    name = dns_name(text)
    assert re.fullmatch("[a-z]([-a-z0-9]*[a-z0-9])?", name)
    assert len(f"{name}-ranks-0-99999-abcde") <= 63
    assert dns_name(name) == name


def test_a_pod_asks_for_what_its_node_has(two_nodes: Plan, root: Path) -> None:
    job = check(root, "jobset", jobset(two_nodes))["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert (job["completions"], job["parallelism"], job["completionMode"]) == (2, 2, "Indexed")
    pod, container = job["template"]["spec"], job["template"]["spec"]["containers"][0]
    limits, requests = container["resources"]["limits"], container["resources"]["requests"]
    cluster = two_nodes.cluster
    assert limits == {"memory": f"{cluster.host_memory_bytes // 2**30}Gi", "nvidia.com/gpu": 8}
    needed = 8 * two_nodes.prediction.host_bytes / 2**30
    assert needed < int(requests["memory"].removesuffix("Gi")) <= cluster.host_memory_bytes // 2**30
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert set(mounts.values()) == set(volumes)
    assert volumes[mounts["/dev/shm"]]["emptyDir"] == {"medium": "Memory", "sizeLimit": "8Gi"}
    assert volumes[mounts[NVME]]["hostPath"] == {"path": NVME, "type": "DirectoryOrCreate"}


def test_other_devices_are_asked_for_by_their_names(root: Path) -> None:
    amd, cpu = make(load_cluster("8xMI300X")), make(local_cpu_cluster(1))
    assert pod_of(check(root, "jobset", jobset(amd)))["containers"][0]["resources"]["limits"]["amd.com/gpu"] == 8
    limits = pod_of(check(root, "jobset", jobset(cpu)))["containers"][0]["resources"]["limits"]
    assert list(limits) == ["memory"]
    resources = check(root, "skypilot", skypilot_task(cpu))["resources"]
    assert "accelerators" not in resources
    assert int(resources["memory"].rstrip("+")) * 2**30 > cpu.prediction.peak_bytes
    nameless = amd.model_copy(update={"cluster": amd.cluster.model_copy(update={"gpu": None})})
    assert "add resources: accelerators: NAME:8" in skypilot_task(nameless)


def test_every_gpu_of_the_catalog_has_a_name_that_skypilot_knows(two_nodes: Plan, root: Path) -> None:
    # The names of get_common_gpus and of the clouds' lists in skypilot 0.14.1.
    known = {"A100", "A100-80GB", "B200", "B300", "GH200", "H100", "H200", "L40S", "MI300X", "RTX4090", "V100"}
    newer = {"MI325X", "MI355X", "V100-32GB"}
    found = set()
    for gpu in load_catalog().gpus:
        cluster = two_nodes.cluster.model_copy(update={"gpu": gpu})
        task = check(root, "skypilot", skypilot_task(two_nodes.model_copy(update={"cluster": cluster})))
        found |= set(task["resources"]["accelerators"])
    assert found == known | newer


@pytest.mark.parametrize("kind", ["jobset", "skypilot"])
def test_a_node_starts_torchrun_with_its_number_and_the_first_address(
    kind: str, two_nodes: Plan, root: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "plan"
    write_plan_folder(two_nodes, folder)
    for name in ("translution", "torchrun", "mkdir"):
        (tmp_path / name).write_text(f'#!/bin/sh\nfor word; do echo "{name} <$word>"; done\n')
        (tmp_path / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "HOME": str(tmp_path)}
    content = check(root, kind, (folder / f"{kind}.yaml").read_text())
    if kind == "jobset":
        container = pod_of(content)["containers"][0]
        environment |= {pair["name"]: pair["value"] for pair in container["env"]} | {"JOB_COMPLETION_INDEX": "1"}
        command = [part.replace(" /plan", f" {folder}") for part in container["command"]]
        first = "vit-base-16-ranks-0-0.vit-base-16"
        job, subdomain = content["spec"]["replicatedJobs"][0]["name"], content["spec"]["network"]["subdomain"]
        assert first == f"{content['metadata']['name']}-{job}-0-0.{subdomain}"
    else:
        environment |= {"SKYPILOT_NODE_RANK": "1", "SKYPILOT_NODE_IPS": "10.0.0.7\n10.0.0.8"}
        command, first = ["bash", "-c", content["run"]], "10.0.0.7"
        assert {Path(path).name for path in content["file_mounts"]} <= {path.name for path in folder.iterdir()}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert lines[lines.index("translution <preflight-node>") + 1] == f"translution <{folder}>"
    words = [line.removeprefix("torchrun ").strip("<>") for line in lines if line.startswith("torchrun")]
    values = dict(itertools.pairwise(words))
    assert values["--nnodes"] == "2"
    assert values["--nproc_per_node"] == "8"
    assert values["--node_rank"] == "1"
    assert values["--master_addr"] == first
    assert words[-3:] == ["train", str(folder), "/project/runs/vit-base-16"]
    if kind == "skypilot":
        assert f"mkdir <{NVME}>" in lines
