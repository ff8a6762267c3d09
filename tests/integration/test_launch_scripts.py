"""The scripts of a plan folder start the plan, and DeepSpeed reads its configuration as intended."""

from __future__ import annotations

import importlib.metadata
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers.runs import write_plan
from helpers.waiting import PATIENCE_S

from translution.distributed.runs.verdict import raise_unless_finished
from translution.distributed.system.environment import free_port, version_warnings
from translution.planner.common.errors import InputError
from translution.planner.config.loading import preset
from translution.planner.config.training import TrainingSpec
from translution.planner.config.zero import OffloadOptimizer, ZeroSpec
from translution.planner.hardware.cluster import load_cluster, local_cpu_cluster
from translution.planner.plans.build import make_plan
from translution.planner.plans.defaults import choose_tile, choose_zero
from translution.planner.plans.folder import environment_variables, hostfile, launch_files, write_plan_folder
from translution.planner.search.space import SearchConstraints, knob_sets, list_strategies

BF16 = TrainingSpec(precision="bf16", data="synthetic", micro_batch=1)
CLUSTERS = ("1xH100", "8xH100", "2x8xH100")


def tools(folder: Path) -> dict[str, str]:
    """Return an environment whose PATH has the folder first, then this Python's programs."""
    path = os.pathsep.join([str(folder), str(Path(sys.executable).parent), os.environ["PATH"]])
    return os.environ | {"PATH": path, "MASTER_PORT": str(free_port())}


@pytest.mark.parametrize("cluster", CLUSTERS)
def test_deepspeed_reads_the_config_of_every_knob_set_and_strategy(cluster: str) -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    spec, where = preset("vit-base/16"), load_cluster(cluster)
    constraints = SearchConstraints(nvme_path="/nvme")
    seen = 0
    for strategy in list_strategies(constraints, where)[0]:
        for knob_set in knob_sets(spec, choose_tile(spec, where.world_size), strategy, where, constraints):
            plan_config = make_config(knob_set.zero, where.world_size)
            read = DeepSpeedZeroConfig(**plan_config["zero_optimization"])
            assert read.stage == strategy.stage
            assert read.overlap_comm == knob_set.zero.overlap_comm
            if strategy.stage == 3:
                assert read.prefetch_bucket_size == knob_set.zero.prefetch_bucket_elements
                assert read.sub_group_size == knob_set.zero.sub_group_elements
                assert read.max_reuse_distance == 0
            optimizer, param = strategy.offload.optimizer_device, strategy.offload.param_device
            assert (read.offload_optimizer is None) == (optimizer == "none")
            assert (read.offload_param is None) == (param == "none")
            if optimizer == "cpu" and strategy.stage == 3:
                assert read.offload_optimizer.ratio == strategy.ratio
            seen += 1
    assert seen > 50


def make_config(zero: ZeroSpec, ranks: int) -> dict[str, Any]:
    from translution.planner.deepspeed.config import deepspeed_config

    return deepspeed_config(BF16, zero, ranks)


def test_configs_that_fail_later_in_deepspeed_are_rejected() -> None:
    # DeepSpeed 0.19.8 accepts these, but fails in the first step or ignores them silently.
    with pytest.raises(ValueError, match="nvme_path"):
        OffloadOptimizer(device="nvme")
    with pytest.raises(ValueError, match="buffer_count: 4 is not allowed: must be at least 8"):
        OffloadOptimizer(device="nvme", nvme_path="/nvme", pipeline_read=True, buffer_count=4)
    training = TrainingSpec(precision="bf16", bf16_master=True, data="synthetic", micro_batch=1)
    with pytest.raises(InputError, match="bf16_master"):
        make_plan(preset("vit-base/32"), load_cluster("8xH100"), training, offload="nvme", nvme_path="/nvme")
    zero = choose_zero(preset("vit-tiny/56"), 12, 2, 8)
    section = make_config(zero, 8)["zero_optimization"]
    assert not [key for key in section if key.startswith(("stage3", "sub_group"))]


def test_the_plan_folder_has_the_files_that_its_cluster_needs(tmp_path: Path) -> None:
    always = {"environment.sh", "launch-torchrun.sh", "job.sbatch", "jobset.yaml", "skypilot.yaml"}
    for name, more in {"8xH100": set(), "2x8xH100": {"hostfile", "launch-ssh.sh"}}.items():
        files = always | more
        plan = make_plan(preset("vit-base/32"), load_cluster(name), BF16)
        assert set(launch_files(plan)) == files
        folder = tmp_path / name
        write_plan_folder(plan, folder)
        for file in files:
            path = folder / file
            if file.endswith((".sh", ".sbatch")):
                subprocess.run(["sh", "-n", str(path)], check=True)
                assert bool(path.stat().st_mode & stat.S_IXUSR) == (file != "environment.sh")
            assert f"`{file}`" in (folder / "README.md").read_text()


def test_the_hostfile_is_read_by_deepspeed(tmp_path: Path) -> None:
    from deepspeed.launcher.runner import fetch_hostfile

    path = tmp_path / "hostfile"
    path.write_text(hostfile(load_cluster("3x8xH100")))
    assert dict(fetch_hostfile(str(path))) == {"node1": 8, "node2": 8, "node3": 8}


def test_slurm_gets_a_task_for_each_rank() -> None:
    plan = make_plan(preset("vit-base/32"), load_cluster("2x8xH100"), BF16)
    lines = launch_files(plan)["job.sbatch"].splitlines()
    assert "#SBATCH --nodes=2" in lines
    assert "#SBATCH --ntasks-per-node=8" in lines
    assert "#SBATCH --gpus-per-node=8" in lines
    assert "#SBATCH --cpus-per-task=14" in lines  # 112 cores of a DGX H100 over 8 ranks.


def test_no_shell_evaluates_a_model_name(tmp_path: Path) -> None:
    name = "x'; touch $(echo owned) `id` \n#SBATCH --wrap"
    spec = preset("vit-base/32").model_copy(update={"name": name})
    plan = make_plan(spec, load_cluster("2x8xH100"), BF16)
    for file, text in launch_files(plan).items():
        assert "owned" not in text or "touch-" in text, file
        assert "`id`" not in text
    jobs = [line for line in launch_files(plan)["job.sbatch"].splitlines() if line.startswith("#SBATCH --job-name")]
    assert len(jobs) == 1


def test_torchrun_runs_the_plan(tmp_path: Path) -> None:
    folder = write_plan(tmp_path / "plan", 1, steps=2)
    command = [str(folder / "launch-torchrun.sh"), str(folder / "runs" / "own")]
    done = subprocess.run(command, env=tools(tmp_path), capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 0, done.stderr[-5000:]
    raise_unless_finished(folder / "runs" / "own", 1, exit_code=0)


def test_threads_are_the_nodes_cores_per_rank() -> None:
    assert environment_variables(load_cluster("8xH100"))["OMP_NUM_THREADS"] == "14"
    assert environment_variables(local_cpu_cluster(1))["DS_ACCELERATOR"] == "cpu"


def test_other_package_versions_give_a_warning() -> None:
    plan = make_plan(preset("vit-tiny/56"), local_cpu_cluster(1), TrainingSpec(data="synthetic"))
    assert version_warnings(plan) == []
    other = plan.model_copy(update={"deepspeed_version": "0.18", "torch_version": "2.1"})
    texts = version_warnings(other)
    assert len(texts) == 2
    assert "the plan was made for 0.18" in texts[0]
    assert "2.1" in texts[1]


@pytest.mark.parametrize(
    ("torch_version", "tested"),
    [("2.10.1", False), ("2.11.0", True), ("2.15.0+cu132", True), ("2.16.0.dev20270101", False), ("3.0.0", False)],
)
def test_tested_versions_of_torch_give_no_warning(
    torch_version: str, tested: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = {"torch": torch_version, "deepspeed": "0.19.8"}
    plan = make_plan(preset("vit-tiny/56"), local_cpu_cluster(1), TrainingSpec(data="synthetic"))
    monkeypatch.setattr(importlib.metadata, "version", installed.__getitem__)
    expected = [] if tested else [f"torch {torch_version} is installed; the plan was made for 2.13"]
    assert version_warnings(plan) == expected
