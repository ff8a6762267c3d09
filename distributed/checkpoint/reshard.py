"""Loads a checkpoint into an engine of another layout: other ranks, stage, offload, sub-groups or tiles.

Each rank fills its own flat vectors, one fragment at a time: the fp32 master copy and the optimizer's moments and step.
Then it copies the master copy to the parameters in the model's dtype.

Sources: DeepSpeed 0.19.8, runtime/zero/stage3.py (step, _reassign_or_swap_out_partitioned_parameters),
runtime/zero/stage_1_and_2.py and runtime/bf16_optimizer.py (update_lp_params), runtime/fp16/unfused_optimizer.py;
ops/adam/cpu_adam.py, ops/lion and ops/adagrad for what their states hold.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from translution.models.layers import OwnedTables
from translution.planner.common import InputError
from translution.planner.costs import QUANTIZED_BLOCK, SMALLEST_QUANTIZED

from .manifest import CheckpointRef
from .reader import MASTER_COPY, CheckpointReader
from .shard_layout import Fragment, UntiledPosition, sub_group_fragments, untiled_numels, untiled_positions
from .weights import WeightsReader

_MOMENTS: dict[str, dict[str, str]] = {
    "AdamW": {"first": "exp_avg", "second": "exp_avg_sq"},
    "AdamW8bit": {"first": "state1", "second": "state2"},
    "DeepSpeedCPUAdam": {"first": "exp_avg", "second": "exp_avg_sq"},
    "DeepSpeedCPULion": {"first": "exp_avg"},
    "FusedAdam": {"first": "exp_avg", "second": "exp_avg_sq"},
    "FusedLion": {"first": "exp_avg"},
    "Adagrad": {"second": "sum"},
    "DeepSpeedCPUAdagrad": {"second": "exp_avg_sq"},
    "SGD": {"first": "momentum_buffer"},
}
"""Names of the moments in the state of each optimizer class."""
_TENSOR_STEPS = ("AdamW", "Adagrad")
"""Classes of torch that count steps in a tensor. DeepSpeed's count in an integer, and SGD does not count."""


@dataclass(frozen=True)
class _Target:
    """A flat vector of this rank's engine that is filled from the checkpoint."""

    master: Tensor
    fragments: Sequence[Fragment]
    optimizer: Any
    """The torch optimizer that updates the vector."""


class _Filler:
    """Fills vectors of an engine from a checkpoint.

    Args:
        reader: the checkpoint.
        positions: position of the engine's parameters in the untiled network.
        dtype: dtype of the moments.
    """

    def __init__(
        self, reader: CheckpointReader | WeightsReader, positions: Mapping[str, UntiledPosition], dtype: torch.dtype
    ) -> None:
        self.reader, self.positions, self.dtype = reader, positions, dtype

    def fill(self, target: _Target) -> None:
        """Fill the master copy of a vector, its moments and its step."""
        reader, kind = self.reader, type(target.optimizer).__name__
        if kind not in _MOMENTS:
            raise InputError(f"optimizer: {kind} is not allowed: its states cannot be resharded")
        self._copy(MASTER_COPY, target, target.master)
        state: dict[str, Any] = {}
        for moment, name in _MOMENTS[kind].items():
            if moment in reader.kinds:
                state[name] = torch.zeros_like(target.master, dtype=self.dtype, requires_grad=False)
                self._copy(moment, target, state[name])
        if state and kind != "SGD":
            state["step"] = torch.tensor(float(reader.step)) if kind in _TENSOR_STEPS else reader.step
        if state and kind == "AdamW8bit":
            _quantize(target.optimizer, state)
        if state:
            target.optimizer.state[target.master] = state

    def _copy(self, kind: str, target: _Target, out: Tensor) -> None:
        flat = out.data.view(-1)
        flat.zero_()
        for part in target.fragments:
            position = self.positions[part.name]
            for piece in position.pieces(part.start, part.numel):
                begin = part.offset + piece.shift
                self.reader.read(position.name, kind, piece.start, flat[begin : begin + piece.numel])


def _quantize(optimizer: Any, state: dict[str, Any]) -> None:
    """Replace the fp32 moments of a vector by quantized ones, where bitsandbytes quantizes."""
    from bitsandbytes.functional import quantize_blockwise

    for number, name in ((1, "dynamic"), (2, "udynamic")):
        moment = state[f"state{number}"]
        if moment.numel() < SMALLEST_QUANTIZED:
            continue
        # All vectors share these tensors, on the device.
        codebook = optimizer.name2qmap[name] = optimizer.name2qmap[name].to(moment.device)
        codes, scales = quantize_blockwise(moment, codebook, blocksize=QUANTIZED_BLOCK)
        state |= {f"state{number}": codes, f"qmap{number}": codebook, f"absmax{number}": scales.absmax}


def load_resharded(engine: Any, ref: CheckpointRef, states_dtype: torch.dtype) -> None:
    """Load a checkpoint of any layout into a new engine; called on every rank.

    Args:
        engine: DeepSpeed's engine.
        ref: names the checkpoint.
        states_dtype: dtype of the optimizer's moments.

    Raises:
        InputError: if the checkpoint is damaged or belongs to another model.
    """
    _fill_engine(engine, CheckpointReader(ref), states_dtype)


def load_first_weights(engine: Any, path: Path) -> None:
    """Load a network file into a new engine whose optimizer has done no step; called on every rank.

    Args:
        engine: DeepSpeed's engine.
        path: the network file.

    Raises:
        InputError: if it is damaged or of another model.
    """
    _fill_engine(engine, WeightsReader(path), torch.float32)


def _fill_engine(engine: Any, reader: CheckpointReader | WeightsReader, states_dtype: torch.dtype) -> None:
    numels = {name: _numel(parameter) for name, parameter in engine.module.named_parameters()}
    owned = next((x.group.owned for x in engine.module.modules() if isinstance(x, OwnedTables)), None)
    _check_numels(reader, untiled_numels(numels, owned))
    filler = _Filler(reader, untiled_positions(numels, owned), states_dtype)
    with torch.no_grad():
        if hasattr(engine.optimizer, "fp32_partitioned_groups_flat"):
            _fill_sub_groups(engine, filler)
        elif hasattr(engine.optimizer, "update_lp_params"):
            _fill_flat_vectors(engine, filler)
        else:
            _fill_unpartitioned(engine, filler)
    _restore_counters(engine, reader)


def _numel(parameter: Any) -> int:
    numel: int = getattr(parameter, "ds_numel", parameter.numel())
    return numel


def _check_numels(reader: CheckpointReader | WeightsReader, expected: Mapping[str, int]) -> None:
    for name in sorted({*expected, *reader.numels}):
        if expected.get(name) != reader.numels.get(name):
            raise InputError(
                f"{name}: {expected.get(name, 0)} elements are not allowed: {reader.folder} holds "
                f"{reader.numels.get(name, 0)}"
            )


def _fill_sub_groups(engine: Any, filler: _Filler) -> None:
    """Fill under ZeRO-3, sub-group by sub-group; a sub-group on NVMe is read, filled and written back."""
    optimizer = engine.optimizer
    group = optimizer.dp_process_group
    ranks, rank = torch.distributed.get_world_size(group), torch.distributed.get_rank(group)
    optimizer.checkpoint_event_prologue()
    for number, master in enumerate(optimizer.fp32_partitioned_groups_flat):
        swapped = optimizer._swappable_optimizer_subgroup(number)
        if swapped:
            optimizer._optimizer_states_and_gradient_swap_in(number)
        numels = {engine.param_names[parameter]: parameter.ds_numel for parameter in optimizer.fp16_groups[number]}
        inner = optimizer.optimizer
        if optimizer.offload_optimizer and optimizer.subgroup_to_device[number] != "cpu":
            inner = optimizer.backup_optimizer
        filler.fill(_Target(master, sub_group_fragments(numels, ranks, rank), inner))
        optimizer._reassign_or_swap_out_partitioned_parameters(number)
        if swapped:
            optimizer._optimizer_states_and_gradient_swap_out(number)
    # This gathers the persistent parameters again.
    optimizer.checkpoint_event_epilogue()


def _fill_flat_vectors(engine: Any, filler: _Filler) -> None:
    """Fill under ZeRO-1 and 2: one vector, in which a parameter may start on one rank and end on the next."""
    optimizer = engine.optimizer
    if hasattr(optimizer, "single_partition_of_fp32_groups"):
        masters, groups = optimizer.single_partition_of_fp32_groups, optimizer.bit16_groups
    else:
        masters, groups = optimizer.fp32_groups_flat_partition, optimizer.bf16_groups
    for master, group in zip(masters, groups, strict=True):
        filler.fill(_Target(master, list(_own_fragments(engine, group)), optimizer.optimizer))
    optimizer.update_lp_params()


def _own_fragments(engine: Any, parameters: Sequence[Any]) -> Iterator[Fragment]:
    for parameter in parameters:
        mapping = parameter._hp_mapping
        if mapping is not None:
            own, flat = mapping.lp_fragment_address, mapping.hp_fragment_address
            yield Fragment(engine.param_names[parameter], own.start, own.numel, flat.start)


def _fill_unpartitioned(engine: Any, filler: _Filler) -> None:
    """Fill without ZeRO: every rank has all parameters."""
    wrapped = hasattr(engine.optimizer, "fp32_groups")
    inner = engine.optimizer.optimizer if wrapped else engine.optimizer
    parameters = list(engine.module.named_parameters())
    masters = engine.optimizer.fp32_groups[0] if wrapped else [parameter for _, parameter in parameters]
    for (name, parameter), master in zip(parameters, masters, strict=True):
        filler.fill(_Target(master, [Fragment(name, 0, parameter.numel(), 0)], inner))
        if wrapped:
            parameter.data.copy_(master.data)


def _restore_counters(engine: Any, reader: CheckpointReader | WeightsReader) -> None:
    for name, count in reader.counters.items():
        setattr(engine, name, count)
    optimizer = engine.optimizer
    scaler = getattr(optimizer, "loss_scaler", None) or getattr(optimizer, "loss_scale_config", None)
    for name, value in reader.scales.items():
        if engine.fp16_enabled() and hasattr(scaler, name):
            setattr(scaler, name, value)
