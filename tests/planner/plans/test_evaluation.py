"""The planned evaluation: bounded, within the memory of training, and none on synthetic data."""

from __future__ import annotations

from typing import Any

import pytest

from translution.planner.common.errors import InputError
from translution.planner.common.phases import Phase
from translution.planner.config.loading import preset
from translution.planner.config.model import override
from translution.planner.config.training import TrainingSpec, parse_training
from translution.planner.hardware.cluster import local_cpu_cluster
from translution.planner.plans.build import make_plan
from translution.planner.plans.evaluation import TRAINING_FRACTION
from translution.planner.plans.plan import Plan

SPEC = override(preset("vit-tiny/56"), classes=10)


def plan_of(offload: str = "none", **training: Any) -> Plan:
    values = {"micro_batch": 2, "steps": 50, "data": "digits"} | training
    spec = override(SPEC, channels=1) if values["data"] == "digits" else SPEC
    path = "/nvme" if "nvme" in offload else None
    return make_plan(spec, local_cpu_cluster(2), TrainingSpec(**values), offload=offload, nvme_path=path)


def test_synthetic_data_are_not_evaluated_unless_asked_for() -> None:
    plan = plan_of(data="synthetic")
    assert plan.evaluation is None
    assert plan.prediction.peak(Phase.EVALUATION) is None
    assert plan_of(data="synthetic", evaluation_samples=0).evaluation is not None
    assert plan_of(evaluation_samples="none").evaluation is None


@pytest.mark.parametrize("offload", ["none", "cpu-optimizer", "cpu", "nvme-optimizer", "nvme"])
def test_the_batch_is_the_largest_that_needs_no_more_memory_than_training(offload: str) -> None:
    plan = plan_of(offload, evaluation_samples=0)
    assert plan.evaluation is not None
    assert plan.evaluation.max_samples is None
    assert plan.evaluation.micro_batch > plan.training.micro_batch
    peaks = [peak for peak in plan.prediction.peaks if peak.phase == Phase.EVALUATION]
    assert {peak.tier for peak in peaks} == set(plan.prediction.tiers)
    for peak in peaks:
        same_tier = [other.bytes for other in plan.prediction.peaks if other.tier == peak.tier and other is not peak]
        assert peak.bytes <= max(same_tier)


@pytest.mark.parametrize("every", [0, 10])
def test_all_evaluations_take_a_tenth_of_the_training_by_default(every: int) -> None:
    plan = plan_of(evaluation_steps=every)
    assert plan.evaluation is not None
    assert plan.evaluation.likely_s is not None
    assert plan.evaluation.max_samples is not None
    assert plan.time is not None
    count = 5 if every else 1
    passes = plan.evaluation.passes(plan.evaluation.max_samples, 2)
    allowed = TRAINING_FRACTION * plan.time.likely_s * 50
    assert passes * plan.evaluation.likely_s * count <= allowed
    assert (passes + 1) * plan.evaluation.likely_s * count > allowed


def test_a_short_training_evaluates_at_least_one_pass_of_its_own_batch() -> None:
    plan = plan_of(steps=1)
    assert plan.evaluation is not None
    assert plan.evaluation.micro_batch == plan.training.micro_batch
    assert plan.evaluation.max_samples == 2 * plan.training.micro_batch


def test_a_given_number_bounds_the_batch_too() -> None:
    plan = plan_of(evaluation_samples=20)
    assert plan.evaluation is not None
    assert plan.evaluation.max_samples == 20
    assert plan.evaluation.micro_batch == 10
    assert plan.evaluation.passes(20, 2) == 1


def test_words_and_numbers_are_read_and_others_refused() -> None:
    assert parse_training({"evaluation_samples": "none"}, "training").evaluation_samples == "none"
    assert parse_training({"evaluation_samples": 7}, "training").evaluation_samples == 7
    for wrong in ("all", -1, 2.5):
        with pytest.raises(InputError, match="evaluation_samples"):
            parse_training({"evaluation_samples": wrong}, "training")


def test_the_plan_of_an_earlier_version_has_no_evaluation() -> None:
    stored = plan_of(evaluation_samples=5).model_dump(mode="json")
    del stored["evaluation"]
    assert Plan.model_validate(stored).evaluation is None
