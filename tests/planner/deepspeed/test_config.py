"""What DeepSpeed is told of a plan."""

from __future__ import annotations

from translution.planner.config.loading import load_model
from translution.planner.config.training import TrainingSpec
from translution.planner.hardware.cluster import load_cluster
from translution.planner.plans.build import make_plan


def test_deepspeed_counts_the_samples_of_the_replicas() -> None:
    training = TrainingSpec(micro_batch=3, accumulation=2)
    plans = [
        make_plan(load_model("vit-tiny/16"), load_cluster("8xH100"), training, stage=1, relation_parallel=ranks)
        for ranks in (1, 2, 8)
    ]
    assert [plan.deepspeed_config()["train_batch_size"] for plan in plans] == [48, 24, 6]
    assert all(plan.run_config.global_batch == 48 for plan in plans)
