"""The DeepSpeed configuration (``ds_config.json``) of a plan, with the defaults of DeepSpeed 0.19.8 set explicitly.

`_offload` turns the plan's offload, which ``translution plan --offload`` chooses, into the sections
``offload_optimizer`` and ``offload_param``. `check_training_state` rejects combinations that DeepSpeed's configuration
accepts, but that then fail or do something else.
"""

from __future__ import annotations

from typing import Any

from ..common.errors import InputError
from ..config.training import TrainingSpec
from ..config.zero import ZeroSpec

NVME_BLOCK_BYTES = 2**20
"""Bytes of the smallest tensor that DeepSpeed writes to NVMe; smaller ones stay on the host."""


def check_training_state(training: TrainingSpec, zero: ZeroSpec, device: str) -> None:
    """Check that DeepSpeed 0.19.8 runs this optimizer with these dtypes on these tiers.

    Args:
        training: gives optimizer and dtypes.
        zero: gives stage and offload.
        device: device of the ranks, "cpu" or "cuda".

    Raises:
        InputError: with the first field that conflicts with the others.
    """
    offloaded = zero.offload_optimizer.device
    plain = offloaded == "none"
    if training.precision == "fp16" and device == "cpu":
        raise InputError("precision: 'fp16' is not allowed: must be fp32 or bf16 on CPU ranks")
    if training.optimizer == "lion" and plain and device == "cpu":
        raise InputError(
            "optimizer: 'lion' is not allowed: must be adamw, adagrad or sgd on CPU ranks without optimizer offload"
        )
    if training.optimizer == "sgd" and offloaded == "nvme":
        raise InputError(
            "optimizer: 'sgd' is not allowed: must be adamw, lion or adagrad with optimizer offload to nvme"
        )
    if zero.offload_optimizer.ratio < 1 and training.optimizer != "adamw":
        raise InputError(
            f"optimizer: {training.optimizer!r} is not allowed: must be adamw with an offload ratio below 1"
        )
    if training.quantizes_states and not plain:
        raise InputError(
            f"adam: {training.adam!r} is not allowed: must be auto, fused, torch or loop with optimizer offload"
        )
    _check_bf16_master(training, zero)
    if zero.stage == 0 and training.accumulation_dtype != training.precision:
        raise InputError(
            f"grad_accum_dtype: {training.grad_accum_dtype!r} is not allowed: must be {training.precision} at stage 0"
        )


def _check_bf16_master(training: TrainingSpec, zero: ZeroSpec) -> None:
    if not training.bf16_master:
        return
    offloaded = zero.offload_optimizer.device
    if zero.stage == 0:
        raise InputError("bf16_master: True is not allowed: the ZeRO stage must be at least 1")
    if offloaded == "nvme":
        raise InputError("bf16_master: True is not allowed: the optimizer must not be offloaded to nvme")
    if (offloaded == "none") != training.bf16_states and offloaded == "none":
        raise InputError("bf16_master: True is not allowed: needs bf16_states too, or the optimizer offloaded to cpu")
    if offloaded == "cpu" and training.optimizer != "adamw":
        raise InputError(f"optimizer: {training.optimizer!r} is not allowed: must be adamw with bf16_master offloaded")


def config_warnings(training: TrainingSpec, zero: ZeroSpec) -> tuple[str, ...]:
    """Return warnings, one sentence each, about settings that run but behave unexpectedly."""
    optimizer, param = zero.offload_optimizer.device, zero.offload_param.device
    texts = []
    if optimizer == "nvme":
        texts.append(
            "DeepSpeed 0.19.8 loses AdamW's moments when it loads a checkpoint of states on NVMe: resume with "
            "translution launch --resume, which restores them"
        )
    if param == "nvme" and optimizer != "nvme":
        texts.append("DeepSpeed 0.19.8 cannot load a checkpoint with parameters on NVMe and the optimizer elsewhere")
    return tuple(texts)


def _optimizer(training: TrainingSpec, zero: ZeroSpec) -> dict[str, Any]:
    """Return the optimizer's section; with offload DeepSpeed uses its own CPU optimizer.

    There is none for AdamW with 8-bit states: DeepSpeed gets that optimizer as an object.
    """
    if training.quantizes_states:
        return {}
    values: dict[str, Any] = {"lr": training.learning_rate, "weight_decay": training.weight_decay}
    plain = zero.offload_optimizer.device == "none"
    if training.optimizer in ("adamw", "lion"):
        values["betas"] = list(training.betas)
    if training.optimizer in ("adamw", "adagrad"):
        values["eps"] = training.epsilon
    if training.optimizer == "adamw" and plain and training.adam != "fused":
        values |= {"torch_adam": True} | ({"fused": True} if training.adam == "torch" else {"foreach": False})
    if training.optimizer == "sgd":
        values |= {"momentum": training.momentum, "foreach": False}
    names = {"adamw": "AdamW", "lion": "Lion", "adagrad": "Adagrad", "sgd": "SGD"}
    return {"optimizer": {"type": names[training.optimizer], "params": values}}


def _precision(training: TrainingSpec) -> dict[str, Any]:
    bf16: dict[str, Any] = {"enabled": training.precision == "bf16"}
    if training.bf16_master:
        bf16["bf16_master_weights_and_grads"] = True
        bf16["bf16_optimizer_states"] = training.bf16_states
    result: dict[str, Any] = {"bf16": bf16}
    if training.torch_autocast:
        # Parameters of "safe" modules would be communicated in the lower precision: none is.
        result["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
    if training.precision == "fp16":
        # DeepSpeed's default loss scaling: 2^16 initially, doubled after 1000 steps without overflow.
        result["fp16"] = {
            "enabled": True,
            "loss_scale": 0,
            "initial_scale_power": 16,
            "loss_scale_window": 1000,
            "hysteresis": 2,
            "min_loss_scale": 1,
        }
    return result | {
        "data_types": {"grad_accum_dtype": training.accumulation_dtype},
        "communication_data_type": training.precision,
    }


def _offload(zero: ZeroSpec) -> dict[str, Any]:
    """Return the sections ``offload_optimizer`` and ``offload_param`` with the keys that DeepSpeed reads per device."""
    result: dict[str, Any] = {}
    optimizer, param = zero.offload_optimizer, zero.offload_param
    if optimizer.device != "none":
        section: dict[str, Any] = {"device": optimizer.device, "pin_memory": optimizer.pin_memory}
        if optimizer.device == "nvme":
            section |= {
                "nvme_path": optimizer.nvme_path,
                "buffer_count": optimizer.buffer_count,
                "pipeline_read": optimizer.pipeline_read,
                "pipeline_write": optimizer.pipeline_write,
            }
        elif zero.stage == 3:
            section["ratio"] = optimizer.ratio
        result["offload_optimizer"] = section
    if param.device != "none":
        section = {"device": param.device, "pin_memory": param.pin_memory}
        if param.device == "nvme":
            section |= {
                "nvme_path": param.nvme_path,
                "buffer_count": param.buffer_count,
                "buffer_size": param.buffer_elements,
                "max_in_cpu": param.max_in_cpu_elements,
            }
        result["offload_param"] = section
    return result


def deepspeed_config(training: TrainingSpec, zero: ZeroSpec, replicas: int) -> dict[str, Any]:
    """Return the content of ``ds_config.json``.

    It overrides these defaults of DeepSpeed: gradient clipping 1.0 (runtime/constants.py), gradient accumulation in the
    model's dtype (runtime/engine.py), limits of reuse and prefetch that keep far more parameters gathered than one tile
    (runtime/zero/config.py), parameters on NVMe that are cached in host memory first and have a second locked copy
    (runtime/zero/offload_config.py), and DeepSpeed's own Adam instead of torch's.

    Args:
        training: gives precision, batch and optimizer.
        zero: gives stage, offload and the other ZeRO settings.
        replicas: ranks over which ZeRO partitions: all of them, or with relation parallelism the replicas. DeepSpeed
            counts their samples only as the global batch.
    """
    stage: dict[str, Any] = {
        "stage": zero.stage,
        "contiguous_gradients": True,
        "overlap_comm": zero.overlap_comm,
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
        if zero.zero_plus_plus:
            stage |= {
                "zero_hpz_partition_size": zero.hpz_ranks,
                "zero_quantized_weights": zero.quantized_weights,
                "zero_quantized_gradients": zero.quantized_gradients,
            }
    config: dict[str, Any] = {
        "train_batch_size": training.global_batch(replicas),
        "train_micro_batch_size_per_gpu": training.micro_batch,
        "gradient_accumulation_steps": training.gradient_accumulation_steps,
        "gradient_clipping": training.gradient_clipping,
        **_precision(training),
        **_optimizer(training, zero),
        "zero_optimization": stage | _offload(zero),
        # Neither torch's SGD nor bitsandbytes is on DeepSpeed's list of optimizers tested with ZeRO; this project's
        # tests run them.
        "zero_allow_untested_optimizer": training.optimizer == "sgd" or training.quantizes_states,
        "steps_per_print": 1_000_000_000,
        "wall_clock_breakdown": False,
    }
    if zero.uses_nvme:
        config["aio"] = aio_section()
    return config


def aio_section() -> dict[str, Any]:
    """Return the section ``aio``: how DeepSpeed's I/O library reads and writes NVMe."""
    return {
        "block_size": NVME_BLOCK_BYTES,
        "queue_depth": 8,
        "intra_op_parallelism": 1,
        "single_submit": False,
        "overlap_events": True,
    }
