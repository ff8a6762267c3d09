"""The upper bound of a rank's memory in a relation group; test_plan_search.py has ranks without one."""

from __future__ import annotations

from typing import Any

from helpers.chance import examples
from hypothesis import given
from hypothesis import strategies as st

from translution.planner.config.loading import preset
from translution.planner.config.model import override
from translution.planner.config.parallel import ParallelSpec
from translution.planner.config.run_config import RunConfig
from translution.planner.config.training import TrainingSpec
from translution.planner.hardware.cluster import ClusterSpec
from translution.planner.memory.estimate import estimate_memory
from translution.planner.memory.upper_bound import bound_memory
from translution.planner.plans.defaults import choose_tile, choose_zero

STRATEGIES = [(0, "none"), (1, "none"), (1, "cpu-optimizer"), (2, "none"), (2, "cpu-optimizer")]
STRATEGIES += [(3, offload) for offload in ("none", "cpu-optimizer", "cpu", "nvme-optimizer", "nvme")]
OUTSIDE = {"driver reserve", "context", "nccl", "nccl host", "blas workspace", "fragmentation", "bookkeeping"}


@examples(40)
@given(
    st.sampled_from(["vit-tiny/56", "vit-small/32", "gpt-mini/160"]),
    st.sampled_from(["cpu", "cuda"]),
    st.sampled_from([(2, 2), (2, 4), (3, 3), (3, 6), (8, 8)]),
    st.sampled_from(STRATEGIES),
    st.sampled_from(["none", "block", "offload"]),
    st.sampled_from([{"operator": "translution"}, {"operator": "translution", "roles": "kv"}, {"operator": "alpha"}]),
    st.integers(1, 12),
    st.sampled_from([1, 3]),
    st.sampled_from(["fp32", "bf16"]),
)
def test_the_bound_of_a_rank_in_a_group_is_never_below_the_estimate(
    model: str,
    device: Any,
    ranks: tuple[int, int],
    strategy: Any,
    mode: str,
    operator: dict[str, Any],
    batch: int,
    times: int,
    precision: Any,
) -> None:
    (group, world), (stage, offload) = ranks, strategy
    spec = override(preset(model), checkpointing=mode, dropout=0.1 if batch % 2 else 0.0, **operator)
    cluster = ClusterSpec(device=device, ranks_per_node=world, device_memory_bytes=80 * 2**30, host_cores=world)
    training = TrainingSpec(precision=precision, micro_batch=batch, gradient_accumulation_steps=times, data="synthetic")
    tile = choose_tile(spec, world, group)
    path = "/nvme" if "nvme" in offload else None
    zero = choose_zero(spec, tile, stage, world, offload=offload, nvme_path=path, relation_ranks=group)
    run = RunConfig(spec, cluster, training, zero, tile, ParallelSpec(relation=group))
    bounds, estimate = bound_memory(run), estimate_memory(run)
    sizes = {"device": bounds.device, "host": bounds.host, "pinned": bounds.pinned, "nvme": bounds.nvme}
    if device == "cpu":
        sizes["host"] = sizes.pop("device")
    for peak in estimate.peaks:
        held = sum(item.bytes for item in peak.breakdown if item.name not in OUTSIDE)
        assert held <= sizes[peak.tier], (peak.phase, peak.tier, held / sizes[peak.tier])
