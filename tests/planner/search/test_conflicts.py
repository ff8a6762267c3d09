"""Constraints that contradict one another, and advice that would change nothing."""

from __future__ import annotations

from typing import Any

import pytest

from translution.planner.common.errors import InputError
from translution.planner.config.loading import preset
from translution.planner.config.training import TrainingSpec
from translution.planner.hardware.cluster import load_cluster
from translution.planner.search.plan_search import NoPlanFits, SearchResult, search_plan
from translution.planner.search.space import SearchConstraints

BF16 = TrainingSpec(precision="bf16", data="synthetic")


def found(model: str, cluster: str, **constraints: Any) -> SearchResult:
    return search_plan(preset(model), load_cluster(cluster), BF16, SearchConstraints(**constraints))


def test_no_advice_proposes_what_was_given() -> None:
    """What rules these plans out is a knob, and nothing that the model or the cluster could change."""
    huge = {"max_live_elements": 10**12, "max_reuse_distance_elements": 10**12}
    with pytest.raises(NoPlanFits) as caught:
        found("vit-large/16", "8x8xH100", micro_batch=1, stage=3, offload="none", zero_overrides=huge)
    assert caught.value.advice == ()
    assert caught.value.hybrids == ()
    assert caught.value.strategies


@pytest.mark.parametrize(
    ("constraints", "fields"),
    [
        ({"offload": "none", "offload_ratio": 0.5}, ("offload", "offload_ratio")),
        ({"stage": 0, "offload": "cpu"}, ("stage", "offload")),
        ({"stage": 2, "offload": "nvme", "nvme_path": "/x"}, ("stage", "offload")),
        ({"offload": "nvme"}, ("offload", "nvme_path")),
        ({"offload": "cpu", "nvme_path": "/x"}, ("offload", "nvme_path")),
        ({"stage": 1, "nvme_path": "/x"}, ("stage", "nvme_path")),
        ({"stage": 2, "offload_ratio": 0.5}, ("stage", "offload_ratio")),
        ({"stage": 2, "quantized": True}, ("stage", "quantized")),
        ({"offload": "cpu", "quantized": True}, ("offload", "quantized")),
        ({"all_nodes": True, "minimize": "nodes"}, ("all_nodes", "minimize")),
        ({"zero_overrides": {"stage": 2}}, ("zero", "stage")),
        ({"zero_overrides": {"offload_param.device": "cpu"}}, ("zero", "offload")),
    ],
)
def test_contradictory_constraints_are_both_named(constraints: dict[str, Any], fields: tuple[str, str]) -> None:
    with pytest.raises(InputError) as caught:
        found("vit-tiny/56", "8xH100", **constraints)
    assert all(field in str(caught.value) for field in fields)


def test_a_dtype_that_no_strategy_runs_is_an_error_of_the_input() -> None:
    with pytest.raises(InputError, match="precision: 'fp16' is not allowed: must be fp32 or bf16 on CPU ranks"):
        search_plan(preset("vit-tiny/56"), load_cluster("cpu:1"), BF16.model_copy(update={"precision": "fp16"}))
