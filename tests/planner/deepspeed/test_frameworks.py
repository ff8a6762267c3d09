"""A plan's DeepSpeed configuration for Hugging Face's Trainer and for Accelerate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from accelerate.commands.config.config_args import ClusterConfig

from translution.planner.config.loading import load_model
from translution.planner.config.training import TrainingSpec
from translution.planner.deepspeed.frameworks import accelerate_config, trainer_config
from translution.planner.hardware.cluster import load_cluster
from translution.planner.plans.build import make_plan
from translution.planner.plans.plan import Plan


def made_plan(cluster: str = "cpu:2", stage: Any = 3, **training: Any) -> Plan:
    return make_plan(load_model("vit-tiny/56"), load_cluster(cluster), TrainingSpec(**training), stage=stage)


def autos(section: dict[str, Any], prefix: str = "") -> set[str]:
    found = {prefix + key for key, value in section.items() if value == "auto"}
    for key, value in section.items():
        found |= autos(value, f"{prefix}{key}.") if isinstance(value, dict) else set()
    return found


BATCH = {"train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"}
RATES = {"optimizer.params.lr", "optimizer.params.weight_decay"}


@pytest.mark.parametrize(
    ("training", "expected"),
    [
        ({}, BATCH | RATES | {"optimizer.params.betas", "optimizer.params.eps", "bf16.enabled"}),
        ({"optimizer": "sgd"}, BATCH | RATES | {"bf16.enabled"}),
    ],
    ids=["adamw", "sgd"],
)
def test_only_what_the_trainer_fills_in_is_auto(training: dict[str, Any], expected: set[str]) -> None:
    plan = made_plan(**training)
    config = trainer_config(plan.deepspeed_config())
    assert autos(config) == expected
    assert autos(plan.deepspeed_config()) == set()
    assert config["zero_optimization"].pop("stage3_gather_16bit_weights_on_model_save") is True
    assert config["zero_optimization"] == plan.deepspeed_config()["zero_optimization"]


def test_nothing_is_gathered_below_stage_3() -> None:
    assert trainer_config(made_plan(stage=1).deepspeed_config())["zero_optimization"]["stage"] == 1
    assert "stage3_gather_16bit_weights_on_model_save" not in str(trainer_config(made_plan(stage=1).deepspeed_config()))


@pytest.mark.parametrize(("cluster", "nodes", "ranks"), [("cpu:2", 1, 2), ("2x8xH100", 2, 16)])
def test_accelerate_reads_its_file(cluster: str, nodes: int, ranks: int, tmp_path: Path) -> None:
    plan, file = made_plan(cluster), tmp_path / "accelerate.yaml"
    file.write_text(accelerate_config(plan.cluster, plan.zero.stage))
    read = ClusterConfig.from_yaml_file(str(file))
    assert (read.num_machines, read.num_processes, read.use_cpu) == (nodes, ranks, False)
    assert str(read.distributed_type) == "DistributedType.DEEPSPEED"
    assert read.deepspeed_config["zero3_init_flag"] is True
    assert (read.main_process_ip is not None) == (nodes > 1)
