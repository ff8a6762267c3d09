"""The DeepSpeed configuration of a plan, with every silent default of 0.19.8 set explicitly."""

from __future__ import annotations

from typing import Any

from .training import TrainingSpec, ZeroSpec


def deepspeed_config(training: TrainingSpec, zero: ZeroSpec, ranks: int) -> dict[str, Any]:
    """The content of ``ds_config.json``.

    DeepSpeed's defaults that this overrides: gradient clipping 1.0 (runtime/constants.py), gradient
    accumulation in the model's dtype (runtime/engine.py), a live set that reuse and prefetch
    enlarge far beyond one tile (runtime/zero/config.py), and another Adam than torch's.

    Args:
        training: precision, batch and optimizer.
        zero: stage and knobs.
        ranks: the world size, which fixes the global batch.
    """
    stage: dict[str, Any] = {
        "stage": zero.stage,
        "contiguous_gradients": True,
        "overlap_comm": False,
        "reduce_bucket_size": zero.reduce_bucket_elements,
    }
    if zero.stage in (1, 2):
        stage["allgather_bucket_size"] = zero.reduce_bucket_elements
    if zero.stage == 3:
        stage |= {
            "stage3_prefetch_bucket_size": zero.prefetch_bucket_elements,
            "stage3_max_live_parameters": zero.max_live_elements,
            "stage3_max_reuse_distance": zero.max_reuse_distance_elements,
            "stage3_param_persistence_threshold": zero.persistence_threshold_elements,
            "sub_group_size": zero.sub_group_elements,
        }
    return {
        "train_batch_size": training.global_batch(ranks),
        "train_micro_batch_size_per_gpu": training.micro_batch,
        "gradient_accumulation_steps": training.accumulation,
        "gradient_clipping": training.gradient_clipping,
        "bf16": {"enabled": training.precision == "bf16"},
        "data_types": {"grad_accum_dtype": training.precision},
        "communication_data_type": training.precision,
        "optimizer": {
            "type": "AdamW",
            "params": {
                "lr": training.learning_rate,
                "betas": list(training.betas),
                "eps": training.epsilon,
                "weight_decay": training.weight_decay,
                "torch_adam": True,
                "foreach": False,
            },
        },
        "zero_optimization": stage,
        "zero_allow_untested_optimizer": False,
        "steps_per_print": 1_000_000_000,
        "wall_clock_breakdown": False,
    }
