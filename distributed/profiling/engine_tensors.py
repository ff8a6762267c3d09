"""The long-lived tensors of a DeepSpeed engine, by item of the memory breakdown.

Attribute names are those of DeepSpeed 0.19.8's optimizers for stage 3, for stages 1 and 2, and for bf16. An attribute
that an optimizer does not have contributes nothing.
"""

from __future__ import annotations

from typing import Any


def _flatten(value: object) -> list[object]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return [tensor for entry in value for tensor in _flatten(entry)]
    return [value]


def _attribute(owner: object, *path: str) -> list[object]:
    for name in path:
        owner = getattr(owner, name, None)
    return _flatten(owner)


def tensors_by_item(engine: Any) -> dict[str, list[object]]:
    """Tensors that torch has allocated, by breakdown item; a tensor in several items belongs to the first."""
    parameters = list(engine.module.parameters())
    optimizer = engine.optimizer
    inner = getattr(optimizer, "optimizer", optimizer)
    backup = getattr(optimizer, "backup_optimizer", None)
    # Step counters are among them: integers, which `Recorder.take_snapshot` drops, or scalar tensors.
    states = [state for owner in (inner, backup) if owner is not None for state in owner.state.values()]
    moments = [value for state in states for value in state.values()]
    swapper = getattr(optimizer, "optimizer_swapper", None)
    swapped = getattr(swapper, "swap_params_info", {}).values()
    buckets = getattr(optimizer, "ipg_buckets", {})
    master = [
        *_attribute(optimizer, "fp32_partitioned_groups_flat"),
        *_attribute(optimizer, "single_partition_of_fp32_groups"),
        *_attribute(optimizer, "fp32_groups_flat_partition"),
        *_attribute(optimizer, "fp32_groups_flat"),
        *_attribute(optimizer, "fp32_groups"),
    ]
    return {
        "parameters": [getattr(p, "ds_tensor", p) for p in parameters]
        + _attribute(optimizer, "lp_param_buffer")
        + _attribute(optimizer, "param_groups_fp16_flat_cpu_memory")
        + _attribute(optimizer, "fp16_partitioned_groups_flat")
        + _attribute(optimizer, "fp16_groups_flat")
        + _attribute(optimizer, "bit16_groups_flat"),
        "persistent parameters": list(parameters),
        "gradients": _attribute(optimizer, "grad_partitions_flat_buffer")
        + _attribute(optimizer, "fp32_groups_gradients_flat")
        + _attribute(optimizer, "averaged_gradients")
        + _attribute(optimizer, "accumulated_grads_in_cpu")
        + [p.grad for p in parameters],
        "master parameters": master,
        "fp32 gradients": [getattr(tensor, "grad", None) for tensor in master]
        + [tensor for info in swapped for tensor in _flatten(info.unswapped_gradients)],
        "optimizer states": moments,
        "reduce bucket": [getattr(bucket, "buffer", None) for bucket in buckets.values()],
        "offload copies": _attribute(optimizer, "param_buffer_of_bit16_for_cpu_offload_groups")
        + _attribute(optimizer, "temp_grad_buffer_for_cpu_offload")
        + _attribute(optimizer, "temp_grad_buffer_for_gpu_offload"),
    }


def swap_buffers(engine: Any) -> dict[str, list[object]]:
    """Locked buffers between host memory and NVMe; torch's allocator does not count them."""
    optimizer = engine.optimizer
    swappers: set[Any] = {getattr(p, "nvme_swapper", None) for p in engine.module.parameters()} - {None}
    return {
        "optimizer swap buffers": _attribute(optimizer, "optimizer_swapper", "swap_buffer_manager", "all_buffers"),
        "parameter swap buffers": [swapper.buffers for swapper in swappers],
        "sub-group swap buffer": [swapper.partitioned_swap_buffer for swapper in swappers],
    }
