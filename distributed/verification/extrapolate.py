"""Extrapolates the measurement of a rehearsal of some layers to the complete model."""

from __future__ import annotations

from collections.abc import Mapping

from translution.planner.common import TRAINING_PHASES, Phase
from translution.planner.plans import Plan
from translution.planner.simulator.engine import OPTIMIZER_SWAP_BUFFERS, SUB_GROUP_BUFFER, make_shards, make_sub_groups
from translution.planner.simulator.network import DtypeSizes, GroupShare, SimulatedNetwork

from ..runs.measurement import MemoryMeasurement

INIT_MODEL, INIT_ENGINE = "construction", "engine"
"""The two parts of init, which a rehearsal measures separately."""
BY_SUB_GROUP = (OPTIMIZER_SWAP_BUFFERS, SUB_GROUP_BUFFER)
"""Breakdown items whose size is that of the largest sub-group, not proportional to the number of layers."""


def join_init(measured: MemoryMeasurement) -> MemoryMeasurement:
    """Return the measurement with one peak for init, the higher of its parts."""
    parts = {INIT_MODEL, INIT_ENGINE} & set(measured.phase_peak_bytes)
    peaks = {name: size for name, size in measured.phase_peak_bytes.items() if name not in parts}
    if parts:
        peaks = {Phase.INIT: max(measured.phase_peak_bytes[name] for name in parts)} | peaks
    return measured.model_copy(update={"phase_peak_bytes": peaks})


def largest_sub_group(plan: Plan, rank: int = 0) -> int:
    """Elements that a rank's optimizer updates at once: its largest sub-group under stage 3, else all of them."""
    sizes, group = DtypeSizes.of_training(plan.training, "cpu"), plan.parallel.relation
    share = GroupShare(plan.model.geometry, group, rank % group) if group > 1 else None
    network = SimulatedNetwork(plan.model, 1, sizes, plan.tile_relations, share=share)
    ranks = plan.run_config.replicas if plan.zero.stage else 1
    by_module = make_shards(network.modules, plan.zero, ranks, plan.training.dtype_bytes)
    shards = [shard for weights in network.modules for shard in by_module[id(weights)]]
    if plan.zero.stage < 3:
        return sum(shard.partition_numel for shard in shards)
    return max(group.numel for group in make_sub_groups(shards, plan.zero, 4))


def _line(at: Mapping[int, int], x: int) -> int:
    """Value at `x` of the line through two points; with a single point, of the line through it and the origin."""
    (x0, y0), *rest = sorted(at.items())
    if not rest:
        return round(y0 * x / x0)
    x1, y1 = rest[0]
    return round(y1 + (x - x1) * (y1 - y0) / (x1 - x0))


def extrapolate(measured: Mapping[int, MemoryMeasurement], groups: Mapping[int, int], depth: int) -> MemoryMeasurement:
    """Extrapolate two measurements of fewer layers to the complete model.

    Each layer adds the same number of bytes, except where the size follows the optimizer's largest sub-group: the
    temporaries of its step and the buffers between host memory and NVMe.

    Args:
        measured: two measurements by number of layers.
        groups: elements of the largest sub-group by number of layers, with that of `depth`.
        depth: number of layers of the complete model.
    """
    fewer, more = sorted(measured)
    low, high = measured[fewer], measured[more]

    def along(a: int, b: int) -> int:
        return _line({fewer: a, more: b}, depth)

    def by_group(a: int, b: int) -> int:
        return _line({groups[fewer]: a, groups[more]: b}, groups[depth])

    def each(a: Mapping[str, int], b: Mapping[str, int]) -> dict[str, int]:
        return {
            name: (by_group if name in BY_SUB_GROUP else along)(a.get(name, 0), b.get(name, 0)) for name in {**a, **b}
        }

    # The maximum of two lines is not a line, so the parts of init are extrapolated before `join_init` joins them.
    resident = along(low.resident_bytes, high.resident_bytes)
    peaks = each(low.phase_peak_bytes, high.phase_peak_bytes)
    for name in {Phase.FIRST_STEP, Phase.STEP} & set(peaks):
        temporaries = (part.phase_peak_bytes.get(name, 0) - part.resident_bytes for part in (low, high))
        peaks[name] = resident + by_group(*temporaries)
    buffers = each(low.swap_buffers_bytes, high.swap_buffers_bytes)
    grown = sum(buffers.values()) - sum(high.swap_buffers_bytes.values())
    return high.model_copy(
        update={
            "entries_bytes": each(low.entries_bytes, high.entries_bytes),
            "resident_bytes": resident,
            "phase_peak_bytes": peaks,
            "peak_bytes": max(peaks[name] for name in TRAINING_PHASES),
            "swap_buffers_bytes": buffers,
            "locked_bytes": high.locked_bytes + grown if high.locked_bytes else 0,
            "disk_bytes": each(low.disk_bytes, high.disk_bytes),
            "saved_bytes": along(low.saved_bytes or 0, high.saved_bytes or 0),
        }
    )
