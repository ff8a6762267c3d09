"""FSDP2's memory: the upper bound is never below the simulation, and states are counted by hand."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from translution.planner.common.phases import Tier
from translution.planner.config.loading import preset
from translution.planner.config.model import override
from translution.planner.config.run_config import RunConfig
from translution.planner.config.training import TrainingSpec
from translution.planner.hardware.cluster import ClusterSpec
from translution.planner.memory.estimate import estimate_memory
from translution.planner.memory.upper_bound import bound_memory
from translution.planner.plans.defaults import choose_fsdp2, choose_tile, whole_rows
from translution.planner.simulator.core import ModuleParams
from translution.planner.simulator.engine.fsdp2 import share_numels

OUTSIDE = ("driver reserve", "context", "nccl", "nccl host", "blas workspace", "fragmentation", "bookkeeping")


def ranks(count: int, device: Any) -> ClusterSpec:
    return ClusterSpec(device=device, ranks_per_node=count, device_memory_bytes=80 * 2**30, host_cores=count)


def run_config(model: str, cluster: ClusterSpec, ahead: int = 0, checkpointing: str = "none", **training: Any) -> Any:
    spec = override(preset(model), checkpointing=checkpointing)
    tile = whole_rows(choose_tile(spec, cluster.world_size) or 1, cluster.world_size)
    zero = choose_fsdp2(spec, tile, cluster).model_copy(update={"prefetch_bucket_elements": ahead})
    return RunConfig(spec, cluster, TrainingSpec(data="synthetic", **training), zero, tile)


@pytest.mark.parametrize("model", ["vit-tiny/56", "gpt-tiny/64", "vit-small/32"])
@pytest.mark.parametrize("cluster", [ranks(2, "cpu"), ranks(8, "cuda"), ranks(64, "cuda")], ids=lambda c: c.name)
def test_the_bound_is_never_below_the_simulated_peaks(model: str, cluster: ClusterSpec) -> None:
    choices = itertools.product(("fp32", "bf16"), ("none", "block"), ((1, 1), (8, 2)), (0, 1))
    for precision, checkpointing, (micro_batch, steps), ahead in choices:
        run = run_config(
            model,
            cluster,
            ahead,
            checkpointing,
            precision=precision,
            micro_batch=micro_batch,
            gradient_accumulation_steps=steps,
        )
        estimate, bounds = estimate_memory(run), bound_memory(run)
        for tier, bound in {Tier.HOST: bounds.host, estimate.own_tier: bounds.device}.items():
            peaks = [peak for peak in estimate.peaks if peak.tier == tier]
            assert all(peak.bytes - sum(map(peak.of, OUTSIDE)) <= bound for peak in peaks)


def test_a_share_is_padded_to_equal_rows() -> None:
    assert share_numels(ModuleParams((5 * 6, 5), lengths=(5, 5)), 4) == [2 * 6, 2]
    assert share_numels(ModuleParams((7,)), 4) == [2]
    assert share_numels(ModuleParams((6,), lengths=(1,)), 4) == [6]


def test_states_take_16_bytes_per_parameter_until_the_step_and_12_between_steps() -> None:
    run = run_config("vit-base/16", ranks(8, "cuda"), precision="bf16", micro_batch=1)
    estimate = estimate_memory(run)
    share = estimate.of("parameters") // 4
    assert share == pytest.approx(15_608_200_168 / 8, rel=0.01)
    assert estimate.of("optimizer states") == 8 * share
    assert estimate.of("gradients") == 0
    assert estimate.of("gradients", "optimizer step") == 4 * share


def test_one_tile_is_gathered_at_a_time_and_a_second_one_with_prefetch() -> None:
    plain, ahead = (run_config("vit-base/16", ranks(8, "cuda"), number, micro_batch=1) for number in (0, 1))
    peaks = [estimate_memory(run).peak("backward") for run in (plain, ahead)]
    copies = [peak.of("copies of the gather") for peak in peaks if peak is not None]
    assert copies[1] > copies[0]
    tile = max(2 * plain.tile_relations * 768 * 768 * 4, 1)
    assert peaks[0] is not None
    assert tile <= peaks[0].of("gathered parameters") < 1.2 * tile
