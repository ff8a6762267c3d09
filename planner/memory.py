"""Memory of one rank in a training step, as a list of named entries for ZeRO 0 to 3 without offload.

Sources: DeepSpeed 0.19.8, runtime/zero/stage3.py, stage_1_and_2.py and partition_parameters.py;
what torch keeps is in activations.py. States are exact; the step's moments err high.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeAlias

from .activations import kept_bytes, peak_bytes, sample_bytes
from .cluster import ClusterSpec
from .model_spec import ModelSpec
from .parameters import TABLES, ParameterGroup, parameter_groups
from .schema import Schema
from .training import TrainingSpec, ZeroSpec
from .twins import Widths

Phase: TypeAlias = Literal["resident", "forward and backward", "optimizer step"]
"""When an entry takes memory: always, or only within one phase of a step."""


class MemoryEntry(Schema):
    """One thing that takes memory on a rank."""

    name: str
    phase: Phase
    bytes: int
    formula: str
    source: str


class MemoryEstimate(Schema):
    """Memory of one rank: its entries, and their sums."""

    entries: tuple[MemoryEntry, ...]
    resident_bytes: int
    """Between two steps."""
    phase_peak_bytes: dict[str, int]
    """At the worst moment of each phase of a step, what is resident included."""
    peak_bytes: int
    """At the worst moment of a step."""

    def of(self, name: str, phase: Phase) -> int:
        """Bytes of an entry in a phase, 0 if there is none."""
        return sum(entry.bytes for entry in self.entries if (entry.name, entry.phase) == (name, phase))


def ceil_div(count: int, parts: int) -> int:
    """Size of each of so many equal parts, the last one padded."""
    return -(-count // parts)


def partitioned(groups: Sequence[ParameterGroup], ranks: int) -> int:
    """Elements per rank when every tensor is padded to a multiple of the ranks and cut."""
    return sum(ceil_div(group.numel, ranks) * group.copies for group in groups)


def _resident(
    groups: Sequence[ParameterGroup], training: TrainingSpec, zero: ZeroSpec, ranks: int
) -> list[MemoryEntry]:
    total = sum(group.total for group in groups)
    share = partitioned(groups, ranks)
    width, name = training.dtype_bytes, training.precision
    local = {
        "parameters": share if zero.stage == 3 else total,
        "states": share if zero.stage >= 1 else total,
    }
    entries = [
        _entry("parameters", local["parameters"] * width, f"{name}, {_shared(zero.stage, 3)}", "stage3.py:906"),
        _entry("optimizer states", local["states"] * 8, f"fp32 m and v, {_shared(zero.stage, 1)}", "torch AdamW"),
    ]
    # DeepSpeed means to share an fp32 model's parameters with the master copy at stage 3, but
    # compares a torch.device with a string there, so it copies; measured.
    if training.precision != "fp32" or zero.stage >= 1:
        text = f"fp32 copy, {_shared(zero.stage, 1)}"
        entries.append(_entry("master parameters", local["states"] * 4, text, "stage3.py:1162"))
    if zero.stage == 3:
        text = f"{name} accumulator, {_shared(3, 3)}"
        entries.append(_entry("gradients", share * width, text, "stage3.py:791"))
        persistent = sum(group.total for group in groups if group.numel <= zero.persistence_threshold_elements)
        text = "tensors up to the persistence threshold stay whole"
        entries.append(_entry("persistent parameters", persistent * width, text, "partition_parameters.py"))
        text = "reduce_bucket_size, always allocated"
        entries.append(_entry("reduce bucket", zero.reduce_bucket_elements * width, text, "stage3.py:780"))
    return entries


def _shared(stage: int, from_stage: int) -> str:
    return "1/ranks of each tensor, padded" if stage >= from_stage else "whole"


def _entry(name: str, size: int, formula: str, source: str, phase: Phase = "resident") -> MemoryEntry:
    return MemoryEntry(name=name, phase=phase, bytes=size, formula=formula, source=source)


def largest_gathered(spec: ModelSpec, groups: Sequence[ParameterGroup], zero: ZeroSpec) -> int:
    """Elements of the largest module that ZeRO-3 gathers at once.

    The tile of logits holds the query's and the key's matrices of its relations.
    """
    both = 2 if {"q", "k"} <= set(spec.roles) else 1
    largest = 0
    for group in groups:
        if group.numel > zero.persistence_threshold_elements:
            largest = max(largest, group.numel * (both if group.component == TABLES else 1))
    return largest


def _forward_and_backward(
    spec: ModelSpec, groups: Sequence[ParameterGroup], training: TrainingSpec, zero: ZeroSpec, cluster: ClusterSpec
) -> list[MemoryEntry]:
    width = training.dtype_bytes
    widths = Widths.of(width, cluster.device)
    kept = kept_bytes(spec, training.micro_batch, widths)
    peak = peak_bytes(spec, training.micro_batch, widths)
    moment = [
        ("activations kept", kept, "what every module keeps for backward", "planner/activations.py"),
        ("activations of the moment", peak - kept, "workspace and gradients of one module", "planner/activations.py"),
    ]
    if cluster.device == "cuda":
        size = training.micro_batch * sample_bytes(spec)
        moment.append(("micro-batch", size, "copied to the device for its forward", "distributed/train.py"))
    if zero.stage == 3:
        gathered = largest_gathered(spec, groups, zero)
        text = "largest module gathered whole; twice while several tensors are copied out of one buffer"
        moment.append(("gathered parameters", 2 * gathered * width, text, "partition_parameters.py:1329"))
        own = gathered + ceil_div(gathered, cluster.ranks)
        text = "gradients of that module, and a rank's reduced share"
        moment.append(("gradients of the moment", own * width, text, "stage3.py:1583"))
    else:
        # Without stage 3 gradients live from backward to the optimizer step only.
        total, share = sum(group.total for group in groups), partitioned(groups, cluster.ranks)
        text = f"{training.precision}, {_shared(zero.stage, 2)}"
        moment.append(("gradients", (share if zero.stage == 2 else total) * width, text, "stage_1_and_2.py"))
        if zero.stage == 1:
            text = "a rank's averaged share beside the whole gradients; measured"
            moment.append(("averaged gradients", share * width, text, "stage_1_and_2.py"))
        bucket = min(zero.reduce_bucket_elements, total) if zero.stage else total
        text = "flat copies that are reduced"
        moment.append(("reduce buffer", 2 * bucket * width if zero.stage else bucket * width, text, "engine.py"))
    return [_entry(*entry, "forward and backward") for entry in moment]


def _optimizer_step(
    groups: Sequence[ParameterGroup], training: TrainingSpec, zero: ZeroSpec, ranks: int
) -> list[MemoryEntry]:
    """Stages 1 to 3 update a sub-group at a time; torch's AdamW takes two temporaries of its size."""
    if zero.stage == 0:
        total, largest = sum(group.total for group in groups), max(group.numel for group in groups)
        text = "three tensors as large as the largest parameter"
        copies = 4 if training.precision != "fp32" else 0
        return [
            _entry("gradients", total * training.dtype_bytes, "whole", "torch", "optimizer step"),
            _entry("fp32 gradients", total * copies, "flat copies", "fp16/fused_optimizer.py", "optimizer step"),
            _entry("Adam's temporaries", 3 * largest * 4, text, "torch AdamW", "optimizer step"),
        ]
    share = partitioned(groups, ranks)
    if zero.stage == 3:
        largest = max(ceil_div(group.numel, ranks) for group in groups)
        share = min(share, zero.sub_group_elements + largest)
    text = "two fp32 tensors of a sub-group"
    return [
        _entry("Adam's temporaries", share * 8, text, "torch AdamW", "optimizer step"),
        _entry("flat gradients", share * 4, "a sub-group's gradients in fp32", "stage3.py:2683", "optimizer step"),
    ]


def estimate_memory(
    spec: ModelSpec,
    cluster: ClusterSpec,
    training: TrainingSpec,
    zero: ZeroSpec,
    tile_relations: int | None = None,
) -> MemoryEstimate:
    """Memory of one rank.

    Args:
        spec: the model.
        cluster: gives the number of ranks and the device.
        training: precision and micro-batch.
        zero: stage and knobs.
        tile_relations: relations per tile; None keeps tables whole.
    """
    groups = parameter_groups(spec, tile_relations)
    entries = _resident(groups, training, zero, cluster.ranks)
    if cluster.device == "cpu":
        samples = training.micro_batch * training.accumulation
        text = "inputs in fp32 or token numbers, targets; of all accumulated micro-batches"
        entries.append(_entry("micro-batches", samples * sample_bytes(spec), text, "distributed/data.py"))
    resident = sum(entry.bytes for entry in entries)
    entries += _forward_and_backward(spec, groups, training, zero, cluster)
    entries += _optimizer_step(groups, training, zero, cluster.ranks)
    phases: tuple[Phase, ...] = ("forward and backward", "optimizer step")
    peaks: dict[str, int] = {
        phase: resident + sum(entry.bytes for entry in entries if entry.phase == phase) for phase in phases
    }
    return MemoryEstimate(
        entries=tuple(entries), resident_bytes=resident, phase_peak_bytes=peaks, peak_bytes=max(peaks.values())
    )
