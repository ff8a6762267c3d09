"""A plan as the arguments of Hugging Face's Trainer."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from translution.planner.common import InputError, MissingPackageError
from translution.planner.deepspeed import TRAINER_CONFIG_FILE

from .plain_plan import load_plain_plan

if TYPE_CHECKING:
    from transformers import TrainingArguments


@contextlib.contextmanager
def environment_variable(name: str, value: str) -> Iterator[None]:
    """Set an environment variable, and restore it afterwards."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def trainer_arguments(plan_folder: str | Path, output: str | Path, **options: Any) -> TrainingArguments:
    """Return the arguments of a Trainer that trains as a plan says: batch, optimizer, schedule, DeepSpeed.

    The Trainer starts no ranks: start the script with DeepSpeed's launcher, torchrun or ``accelerate launch``, with as
    many ranks as the plan has.

    Args:
        plan_folder: a folder that ``translution plan`` has written.
        output: folder of the Trainer's checkpoints.
        options: further arguments of `TrainingArguments`, before those of the plan.

    Raises:
        InputError: if the folder holds no plan, one whose ranks share out the relations, or one of an earlier version
            without a configuration for the Trainer.
        MissingPackageError: without transformers and accelerate.
    """
    try:
        import accelerate  # noqa: F401  # the Trainer needs it, and says so only when it is made
        from transformers import TrainingArguments
    except ImportError:
        raise MissingPackageError(
            "transformers and accelerate are needed: pip install 'translution-scale[integrations]'"
        ) from None
    plan, config = load_plain_plan(plan_folder, "Hugging Face's Trainer"), Path(plan_folder) / TRAINER_CONFIG_FILE
    if not config.exists():
        raise InputError(f"{plan_folder}: has no {TRAINER_CONFIG_FILE}: plan again")
    training = plan.training
    values: dict[str, Any] = {
        "output_dir": str(output),
        "deepspeed": str(config),
        "per_device_train_batch_size": training.micro_batch,
        "gradient_accumulation_steps": training.gradient_accumulation_steps,
        "max_steps": training.steps,
        "warmup_steps": training.warmup_steps,
        "lr_scheduler_type": "cosine",
        "learning_rate": training.learning_rate,
        "weight_decay": training.weight_decay,
        "adam_beta1": training.betas[0],
        "adam_beta2": training.betas[1],
        "adam_epsilon": training.epsilon,
        "max_grad_norm": training.gradient_clipping,
        "bf16": training.precision == "bf16",
        "fp16": training.precision == "fp16",
        "seed": training.seed,
        "label_smoothing_factor": training.label_smoothing,
        "report_to": "none",
    }
    if (found := int(os.environ.get("WORLD_SIZE", "1"))) != plan.world_size:
        raise InputError(f"WORLD_SIZE: {found} is not allowed: must be {plan.world_size}, as planned")
    if plan.cluster.device == "cpu":
        _join_on_cpu()
        values["accelerator_config"] = {"use_configured_state": True}
    return TrainingArguments(**(values | options))


def _join_on_cpu() -> None:
    """Join the process group with gloo: with its option for CPUs, the Trainer would leave DeepSpeed out."""
    from accelerate import PartialState

    with environment_variable("ACCELERATE_USE_DEEPSPEED", "true"):
        PartialState(backend="gloo")
