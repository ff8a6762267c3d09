"""Predicted step times: their parts, hand-computed values and invariants."""

from __future__ import annotations

from typing import Any

import pytest
from helpers.chance import examples
from hypothesis import given
from hypothesis import strategies as st

from translution.planner.common.errors import InputError
from translution.planner.config.geometry import RelationGeometry
from translution.planner.config.loading import PRESET_NAMES, preset
from translution.planner.config.model import override
from translution.planner.config.run_config import RunConfig
from translution.planner.config.training import TrainingSpec
from translution.planner.costs.parameters import count_parameters
from translution.planner.costs.workload import count_flops, count_work, pair_counts
from translution.planner.hardware.cluster import (
    ClusterSpec,
    MatmulRate,
    MeasuredRates,
    Transfer,
    interpolate,
    load_cluster,
)
from translution.planner.plans.defaults import choose_tile, choose_zero, override_zero
from translution.planner.search.plan_search import steps_for_epochs
from translution.planner.search.space import SearchConstraints
from translution.planner.timing.rates import Rates
from translution.planner.timing.step_time import StepTime, estimate_step_time, run_cost

CHANGES: list[dict[str, Any]] = [
    {}, {"roles": "kv"}, {"roles": "q"}, {"window": 2}, {"relative_layers": "first:2"},
    {"relative_layers": "first:2", "other_layers": "alpha"}, {"operator": "alpha"}, {"operator": "alpha", "roles": "v"},
    {"operator": "attention"}, {"operator": "attention", "kv_heads": 1, "ffn": "swiglu"},
    {"operator": "bias"}, {"operator": "shaw"}, {"operator": "absolute"},
]  # fmt: skip


def time_of(
    model: str = "vit-base/16",
    cluster: str | ClusterSpec = "8xA100-80",
    offload: str = "none",
    zero_overrides: dict[str, Any] | None = None,
    stage: Any = 3,
    mode: str = "none",
    **training: Any,
) -> StepTime:
    spec = override(preset(model), checkpointing=mode)
    spec_of_cluster = load_cluster(cluster)
    tile = choose_tile(spec, spec_of_cluster.world_size)
    path = "/nvme" if "nvme" in offload else None
    zero = choose_zero(spec, tile, stage, spec_of_cluster.world_size, offload=offload, nvme_path=path)
    values = {"precision": "bf16", "micro_batch": 8, "data": "synthetic"} | training
    zero = override_zero(zero, zero_overrides or {})
    return estimate_step_time(RunConfig(spec, spec_of_cluster, TrainingSpec(**values), zero, tile))


def seconds(time: StepTime, name: str) -> float:
    return sum(entry.likely_s for entry in time.breakdown if entry.name == name)


@pytest.mark.parametrize("changes", CHANGES, ids=str)
@pytest.mark.parametrize("name", ["vit-tiny/56", "vit-base/16", "gpt-mini/160"])
def test_the_flops_of_all_products_add_up(name: str, changes: dict[str, Any]) -> None:
    spec = override(preset(name), **changes)
    work, flops = count_work(spec), count_flops(spec)
    forward = sum(product.flops * product.copies * product.forward for product in work.products)
    both = sum(product.flops * product.copies * (product.forward + product.backward) for product in work.products)
    assert (forward, both) == (flops.forward, flops.training_step)


def test_fused_attention_writes_no_weights_and_a_causal_one_leaves_out_half() -> None:
    """At 65,536 tokens, in blocks of 128, 513/1024 of the pairs are computed; elements do not grow with N²."""
    short, long = (
        count_work(override(preset("gpt-base/1024"), operator="attention", context=n)) for n in (1024, 65_536)
    )
    assert long.forward_elements == 64 * short.forward_elements
    (pairs,) = [product for product in long.products if product.fused]
    assert (pairs.forward, pairs.backward, pairs.computed) == (2, 4, 513 / 1024)
    dropped = count_work(override(preset("gpt-base/1024"), operator="attention", dropout=0.1))
    assert not any(product.fused for product in dropped.products)
    assert dropped.forward_elements > short.forward_elements + 12 * 11 * 12 * 1024**2
    (pairs,) = [p for p in count_work(override(preset("vit-base/16"), operator="attention")).products if p.fused]
    assert pairs.computed == 1.0


def preset_geometry(name: str) -> RelationGeometry:
    return preset(name).geometry


@pytest.mark.parametrize(
    "geometry",
    [
        *map(preset_geometry, PRESET_NAMES),
        RelationGeometry.grid(2, 3, 4, class_token=True, causal=True),
        RelationGeometry.grid(3, 4, 2, causal=True, window=(None, 1, 0)),
    ],
    ids=str,
)
def test_every_row_of_a_table_is_counted(geometry: RelationGeometry) -> None:
    for role in "qkv":
        counts = pair_counts(geometry, role)
        assert sum(relations for _, relations in counts) == geometry.relations
        assert sum(rows * relations for rows, relations in counts) == geometry.table_rows(role)


def test_rates_computed_by_hand() -> None:
    """An H100 computes at 60% of 989.5 TFLOP/s, and reads and writes the matrices at 75% of 3.35 TB/s besides."""
    rates = Rates(load_cluster("1xH100"), "bf16")
    moved = 2 * 3 * 8192**2 / (0.75 * 3.35e12)
    assert rates.matmul_seconds(8192, 8192, 8192) == pytest.approx(2 * 8192**3 / (0.60 * 989.5e12) + moved)
    # A product of one row is bound by reading the matrix.
    read = 2 * (768 * 768 + 2 * 768) / (0.75 * 3.35e12)
    assert rates.matmul_seconds(1, 768, 768, grouped=True) == pytest.approx(read, rel=0.01)
    assert rates.attention_seconds(512, 64, 512) == pytest.approx(2 * 512 * 512 * 64 / (0.19 * 989.5e12))
    # CPU AdamW: 1.75e9 parameters a second on a DGX A100, more by the root of the bandwidth on a DGX H100, shared by
    # the ranks in use, be it all eight or one.
    for cluster, ranks in (("8xA100-80", 8), ("1xA100-80", 1)):
        assert Rates(load_cluster(cluster), "bf16").host_adam_elements_per_s == pytest.approx(1.75e9 / ranks)
    faster = 1.75e9 * (614.4 / 409.6) ** 0.5
    assert rates.host_adam_elements_per_s == pytest.approx(faster)
    copies = [rates.host_copy("device_to_host", pinned=pinned).bytes_per_s for pinned in (True, False)]
    assert copies == [pytest.approx(0.75 * 63e9), 5e9]
    # Two towers with one adapter of 1.25 GB/s each: half of a tensor comes from the other tower.
    both = Rates(load_cluster("2x4xRTX4090"), "bf16").collective("all_gather")
    assert both.bytes_per_s == pytest.approx(2 * 1.25e9 * 0.7)
    one = Rates(load_cluster("8xH100"), "bf16").collective("all_gather")
    assert one.bytes_per_s == pytest.approx(450e9 * 0.75 * 8 / 7)


@examples(30)
@given(st.sampled_from(["8xA100-80", "2x8xH100", "4xRTX4090", "1xH200"]), st.sampled_from([0, 1, 2, 3]),
       st.sampled_from(["none", "block"]), st.integers(1, 16), st.integers(1, 4))  # fmt: skip
def test_an_interval_contains_the_likely_time(cluster: str, stage: Any, mode: str, batch: int, times: int) -> None:
    time = time_of(
        "vit-small/32", cluster, stage=stage, mode=mode, micro_batch=batch, gradient_accumulation_steps=times
    )
    assert 0 < time.low_s <= time.likely_s <= time.high_s
    assert all(0 <= entry.low_s <= entry.likely_s <= entry.high_s for entry in time.breakdown)
    assert 0 < time.mfu < 1


def test_larger_batches_and_checkpointing_take_longer() -> None:
    one, two = time_of(micro_batch=8), time_of(micro_batch=16)
    assert one.likely_s < two.likely_s < 2 * one.likely_s
    assert two.samples_per_s > one.samples_per_s
    again = time_of(mode="block")
    assert again.likely_s > one.likely_s
    assert seconds(again, "recomputation") == pytest.approx(seconds(one, "forward"), rel=0.05)
    assert again.model_flops == one.model_flops
    assert seconds(again, "parameter gathers") == pytest.approx(1.5 * seconds(one, "parameter gathers"))


def test_an_overlapping_part_adds_only_what_exceeds_compute() -> None:
    alone = time_of()
    overlapped = time_of(zero_overrides={"overlap_comm": True, "prefetch_bucket_elements": 1})
    moving = seconds(alone, "parameter gathers") + seconds(alone, "gradient reduction")
    assert alone.likely_s - overlapped.likely_s == pytest.approx(
        min(moving, seconds(alone, "forward") + seconds(alone, "backward")), rel=0.1
    )
    assert {entry.name for entry in overlapped.breakdown if entry.overlaps} >= {
        "parameter gathers",
        "gradient reduction",
    }


def test_each_offload_tier_adds_its_own_parts() -> None:
    names = {
        offload: {entry.name for entry in time_of(offload=offload).breakdown}
        for offload in ("none", "cpu-optimizer", "cpu", "nvme-optimizer", "nvme")
    }
    assert "gradients to the host" not in names["none"]
    assert "gradients to the host" in names["cpu-optimizer"]
    assert "parameters from the host" in names["cpu"] - names["cpu-optimizer"]
    assert {"optimizer states from NVMe", "optimizer states to NVMe"} <= names["nvme-optimizer"] - names["cpu"]
    assert "parameters from NVMe" in names["nvme"] - names["nvme-optimizer"]
    times = [time_of(offload=offload).likely_s for offload in names]
    assert times == sorted(times)


def test_pipelined_swapping_hides_the_drive() -> None:
    ahead = {"offload_optimizer.pipeline_read": True, "offload_optimizer.pipeline_write": True,
             "offload_optimizer.buffer_count": 12}  # fmt: skip
    slow, fast = (time_of(offload="nvme-optimizer", zero_overrides=zero_overrides) for zero_overrides in ({}, ahead))
    assert fast.likely_s < slow.likely_s
    update = seconds(slow, "optimizer states from NVMe") + seconds(slow, "optimizer states to NVMe")
    assert slow.likely_s - fast.likely_s < update


@pytest.mark.parametrize("pipelined", [False, True])
def test_reading_and_writing_one_drive_add_up(pipelined: bool) -> None:
    """Two CPU ranks of another machine read 1.29 GB/s or wrote 2.07 GB/s; at once, 0.98 and 0.50 GB/s."""
    options = {"offload_optimizer.pipeline_read": True, "offload_optimizer.pipeline_write": True,
               "offload_optimizer.buffer_count": 12} if pipelined else {}  # fmt: skip
    time = time_of(offload="nvme-optimizer", zero_overrides=options)
    names = ("optimizer states from NVMe", "optimizer states to NVMe", "optimizer update")
    read, write, update = (seconds(time, name) for name in names)
    alone = time_of(offload="nvme-optimizer")
    drive = seconds(alone, names[0]) + seconds(alone, names[1])
    assert read + write + (update if pipelined else 0.0) == pytest.approx(drive)


def test_gradients_are_reduced_as_often_as_the_stage_requires() -> None:
    """Stages 2 and 3 reduce gradients with every micro-batch, stages 0 and 1 once per step."""
    for stage, times in ((0, 1), (1, 1), (2, 4), (3, 4)):
        times_of = [time_of("vit-small/32", stage=stage, gradient_accumulation_steps=count) for count in (1, 4)]
        one, four = (seconds(time, "gradient reduction") for time in times_of)
        assert four == pytest.approx(times * one)


def test_hpz_gathers_over_the_network_once_a_step_and_quantization_moves_fewer_bytes() -> None:
    def gathers(steps: int, **zero: Any) -> tuple[float, float]:
        cluster = load_cluster("4x8xA100-80")
        time = time_of(cluster=cluster, zero_overrides=zero, gradient_accumulation_steps=steps)
        return seconds(time, "parameter gathers"), seconds(time, "gradient reduction")

    plain, reduced = gathers(1)
    near = seconds(time_of(cluster="1x8xA100-80"), "parameter gathers")
    hpz, same = gathers(1, hpz_ranks=8)
    # Half of the two gathers of every parameter stay within the node.
    assert hpz == pytest.approx((plain + near) / 2, rel=0.01)
    assert same == reduced
    # With three micro-batches five of six do.
    assert gathers(3, hpz_ranks=8)[0] == pytest.approx(plain / 2 + 5 / 2 * near, rel=0.01)
    # bf16 as integers of one byte, and gradients as half a byte, twice (arXiv 2306.10209); and their conversion.
    assert 0.5 < gathers(1, quantized_weights=True)[0] / plain < 0.75
    assert 0.25 < gathers(1, quantized_gradients=True)[1] / reduced < 0.9


@pytest.mark.parametrize(
    ("cluster", "zero", "message"),
    [
        ("2x8xH100", {"hpz_ranks": 3}, "hpz_ranks: 3 is not allowed: must divide the 8 ranks of one of several nodes"),
        ("1x8xH100", {"hpz_ranks": 8}, "hpz_ranks: 8 is not allowed: must divide the 8 ranks of one of several nodes"),
        ("2x8xH100", {"stage": 2, "hpz_ranks": 8}, "hpz_ranks: 8 is not allowed: must be at its default below stage 3"),
        ("cpu:2", {"quantized_weights": True}, "quantized_weights: True is not allowed: CPU ranks have no kernels"),
    ],
)
def test_what_zero_plus_plus_cannot_do_is_refused(cluster: str, zero: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        time_of(cluster=cluster, zero_overrides=zero)


def test_measured_rates_replace_the_estimates() -> None:
    points = tuple(
        MatmulRate(precision="fp32", rows=rows, width=width, flops_per_s=rows * width * 1e6)
        for rows in (1, 100) for width in (10, 1000)
    )  # fmt: skip
    assert interpolate(points, 10, 100) == pytest.approx(10 * 100 * 1e6)
    assert interpolate(points, 1e9, 1e9) == pytest.approx(100 * 1000 * 1e6)
    assert interpolate(points, 0.1, 1) == pytest.approx(1 * 10 * 1e6)
    measured = MeasuredRates(
        matmul=points,
        memory_bytes_per_s=1e9,
        operation_s=0.0,
        all_gather=Transfer(latency_s=1.0, bytes_per_s=1e9),
        device_adam_elements_per_s=1e8,
        norm_elements_per_s=1e8,
    )
    cluster = load_cluster("cpu:1").model_copy(update={"measured": measured})
    rates = Rates(cluster, "fp32")
    assert rates.collective("all_gather").seconds(2e9) == pytest.approx(3.0)
    assert rates.memory_bytes_per_s == 1e9
    time = time_of("vit-tiny/56", cluster, precision="fp32")
    # The norm of all gradients, then AdamW.
    parameters = count_parameters(preset("vit-tiny/56")).total
    assert seconds(time, "optimizer update") == pytest.approx(2 * parameters / 1e8, rel=1e-3)


def test_the_cost_of_a_run_is_that_of_its_steps() -> None:
    time, cluster = time_of(), load_cluster("8xA100-80").model_copy(update={"price_per_gpu_hour": 2.0})
    training = TrainingSpec(precision="bf16", micro_batch=8, steps=1000, data="synthetic")
    cost = run_cost(time, cluster, training)
    assert cost.samples == 64_000
    assert cost.gpu_hours == pytest.approx(1000 * time.likely_s * 8 / 3600)
    assert cost.price == pytest.approx(2 * cost.gpu_hours)
    assert steps_for_epochs(1_281_167, 300, SearchConstraints(global_batch=1024), cluster) == 375_342
