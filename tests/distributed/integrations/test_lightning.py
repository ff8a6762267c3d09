"""A plan as arguments of Lightning's Trainer.

Importing Lightning takes seconds, and every worker of pytest-xdist imports this file: the tests import it.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.runs import write_plan

from translution.distributed.integrations import lightning_options
from translution.planner.config.loading import load_model
from translution.planner.config.training import TrainingSpec
from translution.planner.hardware.cluster import load_cluster
from translution.planner.plans.build import make_plan
from translution.planner.plans.plan import load_plan


def test_cpu_ranks_get_ddp(tmp_path: Path) -> None:
    from lightning.pytorch.strategies import DDPStrategy

    options = lightning_options(write_plan(tmp_path / "plan", 2, gradient_accumulation_steps=3))
    assert isinstance(options["strategy"], DDPStrategy)
    assert (options["devices"], options["accumulate_grad_batches"], options["max_steps"]) == (2, 3, 4)
    assert (options["precision"], options["accelerator"], options["gradient_clip_val"]) == ("32-true", "cpu", 1.0)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_gpus_get_deepspeed_with_the_plans_configuration(precision: str, tmp_path: Path) -> None:
    from lightning.pytorch.strategies import DeepSpeedStrategy

    training = TrainingSpec(precision=precision)  # type: ignore[arg-type]
    make_plan(load_model("vit-tiny/56"), load_cluster("2x8xH100"), training, stage=3).write(tmp_path / "plan")
    options = lightning_options(tmp_path / "plan")
    strategy, expected = options["strategy"], load_plan(tmp_path / "plan").deepspeed_config()
    assert isinstance(strategy, DeepSpeedStrategy)
    # Lightning refuses the first and computes the second.
    del expected["gradient_accumulation_steps"], expected["train_batch_size"]
    assert strategy.config == expected
    wanted = {"bf16": "bf16-true", "fp16": "16-true"}[precision]
    assert (options["devices"], options["num_nodes"], options["precision"]) == (8, 2, wanted)
