"""Predictions for the plans that reports/gpu/gpu_check.json has the measurements of, on one H200."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from translution.planner import Plan, load_model
from translution.planner.hardware import ClusterSpec, MeasuredRates, load_cluster
from translution.planner.simulator.network.ops import DtypeSizes
from translution.planner.simulator.network.relation_shape import RelationShape
from translution.planner.timing.rates import Rates
from translution.planner.timing.step_time import compute_seconds
from translution.reports.inputs.gpu_record import GpuMemory, GpuTimes, PlanMemoryRow, load_gpu_check, part_data

LAYER_SECONDS, LAYER_SAMPLES = (0.0106, 0.0351), 32
"""Forward and backward of Translution at ViT-B/16 in bf16 through the fused kernels (reports/gpu/README.md)."""


@pytest.fixture
def measured(root: Path) -> Iterator[list[tuple[Plan, PlanMemoryRow]]]:
    """Today's plan, and what was measured, of each plan that ran to its end."""
    folder = str(root / "benchmarks")
    sys.path.append(folder)
    from gpu_parts.memory import CASES

    check = load_gpu_check(root / "reports" / "gpu")
    assert check is not None
    memory = part_data(check, "memory", GpuMemory)
    cluster = ClusterSpec.model_validate(memory.cluster)
    cases = {case.name: case for case in CASES}
    yield [(cases[row.name].plan(cluster, "bf16"), row) for row in memory.plans if not row.error]
    sys.path.remove(folder)


def test_there_are_measured_plans(measured: list[tuple[Plan, PlanMemoryRow]]) -> None:
    assert len(measured) >= 2


def test_the_peak_of_torchs_tensors_is_predicted(measured: list[tuple[Plan, PlanMemoryRow]]) -> None:
    for plan, row in measured:
        assert row.allocated_bytes is not None
        predicted = max(plan.prediction.allocated_bytes_of(phase) or 0 for phase in row.phases)
        assert 1.0 <= predicted / row.allocated_bytes <= 1.05, row.name
        for phase, size in row.phases.items():
            ratio = (plan.prediction.allocated_bytes_of(phase) or 0) / size.measured_bytes
            assert 0.9998 <= ratio <= 1.05, f"{row.name}, {phase}: {ratio:.5f}"


def test_the_memory_in_use_on_the_card_is_predicted(measured: list[tuple[Plan, PlanMemoryRow]]) -> None:
    for plan, row in measured:
        interval = plan.prediction.device_interval_bytes
        assert interval is not None and row.own_device_bytes is not None
        assert interval[0] <= row.own_device_bytes <= interval[1]
        peaks = [peak for phase in row.phases if (peak := plan.prediction.peak(phase)) is not None]
        likely = max(peak.bytes - peak.of("driver reserve") for peak in peaks)
        assert 1.0 <= likely / row.own_device_bytes <= 1.05, row.name


def test_the_time_of_a_step_is_inside_its_interval(measured: list[tuple[Plan, PlanMemoryRow]]) -> None:
    for plan, row in measured:
        assert plan.time is not None and row.step_seconds is not None
        assert plan.time.low_s <= row.step_seconds <= plan.time.high_s, row.name


def test_the_fused_kernels_time_is_predicted() -> None:
    """One layer: the difference that a second layer makes, less its feed-forward network's part."""
    cluster = load_cluster("1xH200")
    levels: list[list[float]] = []
    for level in ("slow", "likely", "fast"):
        one, two = (
            compute_seconds(load_model("vit-base/16", depth=depth), LAYER_SAMPLES, 1, Rates(cluster, "bf16", level))
            for depth in (1, 2)
        )
        levels.append([b - a for a, b in zip(one, two, strict=True)])
    for (slow, likely, fast), seconds in zip(zip(*levels, strict=True), LAYER_SECONDS, strict=True):
        assert fast < seconds < slow
        assert likely == pytest.approx(seconds, rel=0.2)


def test_measured_rates_are_used_in_place_of_the_catalogs(root: Path) -> None:
    """With the rates of the record a fused product runs at about half of the rate of a large one."""
    check = load_gpu_check(root / "reports" / "gpu")
    assert check is not None
    found: dict[str, Any] = part_data(check, "times", GpuTimes).model_dump()["rates"]
    rates = MeasuredRates.model_validate(found)
    cluster = load_cluster("1xH200").model_copy(update={"measured": rates})
    fastest = max(point.flops_per_s for point in rates.matmul if point.precision == "bf16")
    assert Rates(cluster, "bf16").fused_seconds(6400, 768, 768) == pytest.approx(2 * 6400 * 768**2 / fastest / 0.55)
    assert Rates(cluster, "bf16").has_fused_kernels
    assert not Rates(cluster, "fp32").has_fused_kernels
    assert not Rates(load_cluster("8xMI300X"), "bf16").has_fused_kernels


@pytest.mark.parametrize(("dim", "heads"), [(768, 12), (760, 10), (1024, 2)])
def test_time_and_memory_take_the_fused_kernels_for_the_same_layers(dim: int, heads: int) -> None:
    """760 is no multiple of 16, and two heads of 512 are too wide."""
    spec, fits = load_model("vit-base/16", depth=1, dim=dim, heads=heads), (dim, heads) == (768, 12)
    with_kernels, without = (load_cluster(name) for name in ("1xH200", "1xMI300X"))
    shape = RelationShape(
        spec.geometry, 1, heads, dim, dim, dim, replace(DtypeSizes.of(2, "cuda"), fused=True)
    )  # fmt: skip
    assert shape.fused == fits
    named = with_kernels.model_copy(update={"gpu": without.gpu})
    seconds = [compute_seconds(spec, 8, 1, Rates(one, "bf16"))[0] for one in (with_kernels, named)]
    assert (seconds[0] < 0.7 * seconds[1]) == fits
