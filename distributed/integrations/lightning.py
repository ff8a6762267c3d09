"""A plan as the arguments of Lightning's Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from translution.planner.common import MissingPackageError

from .plain_plan import load_plain_plan

_PRECISION = {"fp32": "32-true", "bf16": "bf16-true", "fp16": "16-true"}
_SET_BY_LIGHTNING = ("train_batch_size", "gradient_accumulation_steps")


def lightning_options(plan_folder: str | Path) -> dict[str, Any]:
    """Return arguments of ``lightning.Trainer``: a plan's ranks, steps, batch, precision and DeepSpeed strategy.

    Lightning runs DeepSpeed on GPUs only (2.6, pytorch/strategies/deepspeed.py). For a plan of CPU ranks the strategy
    is DDP with gloo, which keeps the whole training state on every rank.

    Args:
        plan_folder: a folder that ``translution plan`` has written.

    Raises:
        InputError: if the folder holds no plan, or one whose ranks share out the relations.
        MissingPackageError: without lightning.
    """
    try:
        from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy
    except ImportError:
        raise MissingPackageError("lightning is missing: pip install 'translution-scale[integrations]'") from None
    plan = load_plain_plan(plan_folder, "Lightning's Trainer")
    training, cluster = plan.training, plan.cluster
    options: dict[str, Any] = {
        "devices": cluster.ranks_per_node,
        "num_nodes": cluster.nodes,
        "max_steps": training.steps,
        "accumulate_grad_batches": training.gradient_accumulation_steps,
        "precision": _PRECISION[training.precision],
    }
    if cluster.device == "cpu":
        strategy = DDPStrategy(process_group_backend="gloo")
        clip = {"gradient_clip_val": training.gradient_clipping or None}
        return options | {"accelerator": "cpu", "strategy": strategy} | clip
    config = {key: value for key, value in plan.deepspeed_config().items() if key not in _SET_BY_LIGHTNING}
    return options | {"accelerator": "gpu", "strategy": DeepSpeedStrategy(config=config)}
