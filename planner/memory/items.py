"""Formulas and sources of the items of a memory breakdown, by name."""

from __future__ import annotations

from ..costs.optimizer import state_name
from ..simulator.engine import base as names
from ..simulator.engine.base import EngineConfig
from ..simulator.network.group_ops import EXCHANGED
from ..simulator.network.model import MICRO_BATCHES, OFFLOADED
from ..simulator.network.ops import ACTIVATIONS, ATTENTION_WEIGHTS, CASTS, GRADIENTS, TEMPORARY, WEIGHT_GRADIENTS
from ..simulator.network.relation_ops import WORKSPACE
from .fsdp2_items import FSDP2_ITEMS

_ZERO3, _ZERO12 = "runtime/zero/stage3.py", "runtime/zero/stage_1_and_2.py"
_PARTITION, _SWAP = "runtime/zero/partition_parameters.py", "runtime/swap_tensor"
_FIXED: dict[str, tuple[str, str]] = {
    ACTIVATIONS: (
        "outputs that are in use or saved for backward, layer by layer",
        "planner/simulator/network/block.py",
    ),
    GRADIENTS: ("gradients of activations during backward", "planner/simulator/core.py"),
    ATTENTION_WEIGHTS: ("weights of every pair of tokens, B·h·N² a layer, and their logits", "models/ops/grouped.py"),
    WORKSPACE: ("rows of one relation's pairs and their products, bounded by workspace_bytes", "models/ops/context.py"),
    TEMPORARY: ("tensors that live during one operation only", "planner/simulator/network/ops.py"),
    CASTS: ("parameters as products take them, held by autocast or saved for backward", "torch.autocast"),
    MICRO_BATCHES: ("inputs and targets of the step's micro-batches", "distributed/data/batching.py"),
    OFFLOADED: ("inputs of checkpointed blocks, saved on the host", "fairscale nn/checkpoint"),
    "random states": ("states of torch's generator, saved by each checkpointed block", "torch/utils/checkpoint.py"),
    names.BUFFERS: ("cosines and sines of rotary layers; index lists of pairs on a GPU", "models/ops/rotary.py"),
    EXCHANGED: (
        "rows and values of pairs on their way between the ranks of a group, B·G·N·C and B·h·N² each",
        "models/ops/relation_parallel/group.py",
    ),
    names.GATHERED: ("full parameters of the modules that run", f"{_PARTITION}:1329"),
    names.GATHER_COPIES: ("a rank's partitions, copied before the gather, or quantized", f"{_PARTITION}:1329"),
    names.SECONDARY: (
        "hpZ: 1/hpz_ranks of each tensor, from its first use in a step to the update",
        f"{_PARTITION}:1900",
    ),
    names.BACKEND_COPIES: (
        "gloo reduces and gathers in tensors of its own; nothing on a GPU",
        "c10d, ProcessGroupGloo",
    ),
    names.NORM: ("a partition of a gradient in fp64, to be squared", f"{_ZERO3}:1960"),
    names.STAGING: ("copies between host and device", "runtime/zero/utils.py:205"),
    names.OPTIMIZER_SWAP_BUFFERS: (
        "buffer_count · the largest sub-group in fp32, aligned",
        f"{_SWAP}/optimizer_utils.py:185",
    ),
    names.PARAM_SWAP_BUFFERS: ("buffer_count · buffer_size, aligned", f"{_SWAP}/partitioned_param_swapper.py:104"),
    names.SUB_GROUP_BUFFER: ("the full tensors of the largest sub-group, all ranks' partitions", f"{_ZERO3}:1009"),
    names.STREAMS: ("two gathers and two reductions that wait for another stream; an upper bound", f"{_ZERO3}:462"),
    names.FIRST_COPIES: ("pinned partitions that the flat buffer replaced, held by the allocator", f"{_ZERO3}:906"),
    names.LOADED: ("the complete file of a rank", "runtime/engine.py:4816"),
}


def describe_item(name: str, config: EngineConfig) -> tuple[str, str]:
    """Return the formula in words and the source of a breakdown item.

    Args:
        name: name of the item.
        config: stage, dtypes and knobs, which formulas mention.
    """
    training, zero = config.training, config.zero
    if zero.uses_fsdp2 and name in FSDP2_ITEMS:
        return FSDP2_ITEMS[name]
    if name in _FIXED:
        return _FIXED[name]
    ranks = "ranks" if config.run.parallel.relation == 1 else "replicas"
    optimizer = _ZERO3 if zero.stage == 3 else _ZERO12

    def shared(stage: int) -> str:
        return f"1/{ranks} of each tensor, padded" if zero.stage >= stage else "full"

    texts = {
        names.PARAMETERS: (f"{training.precision}, {shared(3)}", f"{_ZERO3}:906"),
        names.PERSISTENT: ("tensors up to the persistence threshold stay full", _PARTITION),
        names.MASTER_PARAMETERS: (f"{training.master_dtype} copy, {shared(1)}", f"{optimizer}:1162"),
        names.OPTIMIZER_STATES: (
            f"{training.states_dtype} {state_name(training)} of {training.optimizer}, {shared(1)}",
            "torch/optim, ops/adam",
        ),
        names.SHARED_GRADIENTS: _describe_gradients(config, shared(2)),
        names.STEP_GRADIENTS: (f"a sub-group's gradients in {training.master_dtype} for the update", f"{_ZERO3}:2683"),
        names.BUCKET: (f"reduce_bucket_size in {training.precision}", f"{optimizer}:780"),
        WEIGHT_GRADIENTS: (f"{training.precision} gradients of parameters that are not yet reduced", "torch autograd"),
        names.REDUCE_COPIES: (
            "contiguous copies of gradients while they are reduced, and casts",
            "runtime/comm/coalesced_collectives.py:102",
        ),
        names.OPTIMIZER_TEMPORARIES: (f"tensors that {training.optimizer} makes to update a sub-group", "torch/optim"),
        names.CONSTRUCTION_TENSORS: (
            "tensors in fp32 while the model is built, and copies that become states",
            f"{_PARTITION}:266",
        ),
        names.OFFLOAD_COPIES: ("the share of parameters, and the largest gradient twice", f"{_ZERO12}:700"),
    }
    return texts.get(name, (name, "planner/simulator"))


def _describe_gradients(config: EngineConfig, share: str) -> tuple[str, str]:
    """Return formula and source of the gradients that wait for the step."""
    dtype, below_3 = config.training.accumulation_dtype, config.zero.stage in (1, 2)
    if config.sums_all_gradients:
        return f"{dtype} accumulator of all parameters, full", "runtime/bf16_optimizer.py:180"
    if below_3 and config.widens_gradients:
        return f"{dtype} accumulator, as large as the rank's share of all parameters joined", f"{_ZERO12}:1268"
    if below_3:
        return f"{dtype} gradients of the tensors of which the rank owns a part", f"{_ZERO12}:2184"
    return f"{dtype} accumulator, {share}", f"{_ZERO3}:791"
