"""The upper bound of a rank's memory, above all in a relation group; test_plan_search.py has more without one."""

from __future__ import annotations

from typing import Any

import pytest
from helpers.chance import examples
from hypothesis import given
from hypothesis import strategies as st

from translution.planner.common.phases import Tier
from translution.planner.config.loading import preset
from translution.planner.config.model import ModelSpec, override
from translution.planner.config.parallel import ParallelSpec
from translution.planner.config.run_config import RunConfig
from translution.planner.config.training import TrainingSpec
from translution.planner.hardware.cluster import ClusterSpec
from translution.planner.memory.estimate import PhasePeak, estimate_memory
from translution.planner.memory.upper_bound import bound_memory
from translution.planner.plans.defaults import choose_tile, choose_zero

STRATEGIES = [(0, "none"), (1, "none"), (1, "cpu-optimizer"), (2, "none"), (2, "cpu-optimizer")]
STRATEGIES += [(3, offload) for offload in ("none", "cpu-optimizer", "cpu", "nvme-optimizer", "nvme")]
OUTSIDE = {"driver reserve", "context", "nccl", "nccl host", "blas workspace", "fragmentation", "bookkeeping"}


def run_config(
    spec: ModelSpec, device: Any, group: int, world: int, training: TrainingSpec, stage: Any, offload: Any
) -> RunConfig:
    cluster = ClusterSpec(device=device, ranks_per_node=world, device_memory_bytes=80 * 2**30, host_cores=world)
    tile, path = choose_tile(spec, world, group), "/nvme" if "nvme" in offload else None
    zero = choose_zero(spec, tile, stage, world, offload=offload, nvme_path=path, relation_ranks=group)
    return RunConfig(spec, cluster, training, zero, tile, ParallelSpec(relation=group))


def held(peak: PhasePeak) -> int:
    """Bytes of tensors at a peak."""
    return sum(item.bytes for item in peak.breakdown if item.name not in OUTSIDE)


@examples(40)
@given(
    st.sampled_from(["vit-tiny/56", "vit-small/32", "gpt-mini/160"]),
    st.sampled_from(["cpu", "cuda"]),
    st.sampled_from([(1, 4), (2, 2), (2, 4), (3, 3), (3, 6), (8, 8)]),
    st.sampled_from(STRATEGIES),
    st.sampled_from(["none", "block", "offload"]),
    st.sampled_from([{"operator": "translution"}, {"operator": "translution", "roles": "kv"}, {"operator": "alpha"}]),
    st.sampled_from([1, 2, 5, 64, 101]),
    st.sampled_from([1, 3]),
    st.sampled_from([("fp32", None), ("bf16", None), ("bf16", "fp32")]),
)
def test_the_bound_is_never_below_the_estimate(
    model: str,
    device: Any,
    ranks: tuple[int, int],
    strategy: Any,
    mode: str,
    operator: dict[str, Any],
    batch: int,
    times: int,
    dtypes: tuple[Any, Any],
) -> None:
    (group, world), (stage, offload), (precision, gradients) = ranks, strategy, dtypes
    # DeepSpeed accumulates in the parameters' dtype without ZeRO.
    gradients = gradients if stage else None
    spec = override(preset(model), checkpointing=mode, dropout=0.1 if batch % 2 else 0.0, **operator)
    training = TrainingSpec(
        precision=precision,
        grad_accum_dtype=gradients,
        micro_batch=batch,
        gradient_accumulation_steps=times,
        data="synthetic",
    )
    run = run_config(spec, device, group, world, training, stage, offload)
    bounds, estimate = bound_memory(run), estimate_memory(run)
    sizes = {"device": bounds.device, "host": bounds.host, "pinned": bounds.pinned, "nvme": bounds.nvme}
    if device == "cpu":
        sizes["host"] = sizes.pop("device")
    for peak in estimate.peaks:
        assert held(peak) <= sizes[peak.tier], (peak.phase, peak.tier, held(peak) / sizes[peak.tier])


@pytest.mark.parametrize("group", [2, 4, 8])
def test_the_bound_is_close_where_activations_are_most_of_what_a_rank_holds(group: int) -> None:
    """Rows and pairs of other ranks' samples, too: the more ranks, the more of them."""
    training = TrainingSpec(precision="fp32", micro_batch=64, data="synthetic")
    run = run_config(preset("vit-small/32"), "cuda", group, 8, training, 3, "none")
    peak = estimate_memory(run).worst(Tier.DEVICE)
    assert peak is not None
    with_group, without = (run.cluster.device_overhead(relation_ranks=ranks) for ranks in (group, 1))
    assert with_group is not None
    assert without is not None
    # A search adds what a GPU holds without a group, so the bound has the group's communicators.
    communicators = with_group.device_bytes(0) - without.device_bytes(0)
    assert communicators > 0
    assert held(peak) <= bound_memory(run).device - communicators <= 1.05 * held(peak)
