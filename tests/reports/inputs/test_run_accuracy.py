"""On a GPU each measured figure stands next to the prediction of the same figure."""

from __future__ import annotations

import pytest

from translution.distributed.runs.measurement import MemoryMeasurement
from translution.planner.common.phases import TRAINING_PHASES, Phase, Tier
from translution.planner.config.loading import preset
from translution.planner.config.training import TrainingSpec
from translution.planner.hardware.cluster import load_cluster
from translution.planner.plans.build import make_plan
from translution.reports.inputs.run_accuracy import DEVICE_USED, RESERVED, RESIDENT, predicted_and_measured


def test_what_torch_allocated_and_reserved_is_compared_without_the_drivers_part() -> None:
    cluster = load_cluster("1xH100")
    plan = make_plan(preset("vit-tiny/56"), cluster, TrainingSpec(precision="bf16", data="synthetic"))
    prediction, overhead = plan.prediction, cluster.device_overhead()
    assert overhead is not None
    measured = MemoryMeasurement(
        rank=0, device="cuda", step=2, entries_bytes={}, resident_bytes=1, phase_peak_bytes={Phase.BACKWARD: 2},
        peak_bytes=2, process_peak_bytes=3, reserved_bytes=4, device_used_bytes=5,
    )  # fmt: skip
    rows = {
        label: (tier, predicted, size) for tier, label, predicted, size in predicted_and_measured(prediction, measured)
    }
    outside = overhead.total("likely", in_torch=False)
    highest = max(prediction.bytes_of(phase) for phase in TRAINING_PHASES)
    assert rows[RESERVED] == (Tier.DEVICE, highest - outside, 4)
    assert rows[DEVICE_USED] == (Tier.DEVICE, highest - overhead.item("driver_reserve").likely_bytes, 5)
    tier, allocated, size = rows[f"peak of {Phase.BACKWARD}"]
    assert (tier, size) == (Tier.DEVICE, 2)
    # The bookkeeping, 64 KiB, is added to the prediction without fragmentation.
    reserved = prediction.bytes_of(Phase.BACKWARD) - outside
    assert overhead.reserved_bytes(allocated) == pytest.approx(reserved, abs=2**16)
    assert rows[RESIDENT][1] < prediction.resident_bytes - outside


def test_on_a_cpu_the_whole_peak_is_allocated() -> None:
    plan = make_plan(preset("vit-tiny/56"), load_cluster("cpu:1"), TrainingSpec(data="synthetic"))
    for peak in plan.prediction.peaks:
        assert peak.allocated_bytes == peak.reserved_bytes == peak.bytes
