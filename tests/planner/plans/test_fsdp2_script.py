"""Plans of FSDP2: chosen only on request, refused where only DeepSpeed works, written with their training script."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from translution.distributed.launcher.launcher import launch
from translution.planner import plan as find_plan
from translution.planner.common.errors import InputError
from translution.planner.config.loading import load_model
from translution.planner.config.training import TrainingSpec
from translution.planner.config.zero import ZeroSpec
from translution.planner.hardware.cluster import load_cluster
from translution.planner.plans.build import make_plan
from translution.planner.plans.folder import write_plan_folder
from translution.planner.plans.fsdp2_script import FSDP2_SCRIPT_FILE
from translution.planner.plans.plan import Plan, load_plan


@pytest.fixture
def plan(root: Path) -> Plan:
    spec = load_model(str(root / "examples" / "digits.yaml"))
    return make_plan(spec, load_cluster("cpu:1"), TrainingSpec(), engine="fsdp2")


def test_a_search_tries_it_only_when_asked() -> None:
    usual = find_plan("vit-base/32", "8xH100", precision="bf16", micro_batch=1)
    assert not usual.plan.zero.uses_fsdp2
    assert "FSDP2" not in {verdict.strategy for verdict in usual.strategies}
    asked = find_plan("vit-base/32", "8xH100", precision="bf16", micro_batch=1, engine="fsdp2")
    assert asked.plan.zero.uses_fsdp2
    assert [verdict.strategy for verdict in asked.strategies] == ["FSDP2"]
    assert asked.plan.time is not None
    assert asked.plan.evaluation is None
    assert {part.name for part in asked.plan.time.breakdown} >= {"parameter gathers", "gradient reduction"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stage": 2}, "stage: 2 is not allowed: must be 3 with engine fsdp2"),
        ({"offload": "cpu"}, "offload: 'cpu' is not allowed: must be none with engine fsdp2"),
        ({"zero_overrides": {"overlap_comm": True}}, "zero overlap_comm: True is not allowed: must be left out"),
        ({"optimizer": "sgd"}, "optimizer: 'sgd' is not allowed: must be adamw under FSDP2"),
        ({"checkpointing": "offload"}, "checkpointing: 'offload' is not allowed: must be none or block under FSDP2"),
        ({"engine": "fsdp3"}, "engine: 'fsdp3' is not allowed"),
    ],
)
def test_what_it_does_not_have_is_refused_in_one_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        find_plan("vit-base/32", "8xH100", **({"engine": "fsdp2", "micro_batch": 1} | options))


def test_a_plan_without_the_field_is_deepspeeds(plan: Plan, tmp_path: Path) -> None:
    spec, cluster = plan.model, plan.cluster
    earlier = make_plan(spec, cluster, TrainingSpec())
    write_plan_folder(earlier, tmp_path / "plan")
    path = tmp_path / "plan" / "plan.json"
    data = json.loads(path.read_text())
    del data["zero"]["engine"], data["digest"]  # as an earlier version wrote it
    path.write_text(json.dumps(data))
    assert load_plan(tmp_path / "plan") == earlier
    with pytest.raises(ValueError, match="engine: 'fsdp2' is not allowed: must be deepspeed below stage 3"):
        ZeroSpec(engine="fsdp2", stage=2)


def test_the_folder_has_the_script_and_nothing_of_deepspeed(plan: Plan, tmp_path: Path) -> None:
    folder = tmp_path / "plan"
    write_plan_folder(plan, folder)
    names = {path.name for path in folder.iterdir()}
    files = {"README.md", "environment.sh", "jobset.yaml", "launch-torchrun.sh", "plan.json", "skypilot.yaml"}
    assert names == files | {FSDP2_SCRIPT_FILE}
    ast.parse((folder / FSDP2_SCRIPT_FILE).read_text())
    assert load_plan(folder) == plan
    readme = (folder / "README.md").read_text()
    assert all(f"`{name}`" in readme for name in names - {"README.md"})
    assert "DeepSpeed" not in readme
    task = yaml.safe_load((folder / "skypilot.yaml").read_text())
    assert f"~/plan/{FSDP2_SCRIPT_FILE}" in task["file_mounts"]
    for name in ("skypilot.yaml", "jobset.yaml"):
        assert "preflight-node" not in (folder / name).read_text()
    with pytest.raises(InputError, match=r"must be deepspeed; \./launch-torchrun\.sh starts this plan"):
        launch(folder)
    with pytest.raises(InputError, match="must be deepspeed"):
        plan.deepspeed_config()
