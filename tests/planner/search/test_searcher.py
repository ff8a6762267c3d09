"""Which candidate a search prefers, and the settings with which a search finds a candidate and no other."""

from __future__ import annotations

import dataclasses

import pytest

from translution.planner.config.loading import preset
from translution.planner.config.training import TrainingSpec
from translution.planner.hardware.cluster import load_cluster
from translution.planner.search.plan_search import plan, search_plan
from translution.planner.search.searcher import Searcher
from translution.planner.search.space import SearchConstraints

BF16 = TrainingSpec(precision="bf16", data="synthetic")


def test_recomputation_is_chosen_only_where_it_pays() -> None:
    """The thread that runs DeepSpeed's engine launches recomputed kernels too, so that they are never free."""
    spec = preset("vit-base/16").model_copy(update={"operator": "attention"})
    chosen = search_plan(spec, load_cluster("8xA100-80"), BF16).plan
    assert chosen.model.checkpointing == "none"
    seconds = []
    for mode in ("none", "block"):
        again = search_plan(spec, load_cluster("8xA100-80"), BF16, SearchConstraints(checkpointing=mode, stage=2)).plan
        assert again.time is not None
        seconds.append({part.name: part.likely_s for part in again.time.breakdown}["engine"])
    assert seconds[0] < seconds[1]


def test_at_equal_time_the_plan_with_fewer_features_wins() -> None:
    spec = preset("vit-base/16").model_copy(update={"operator": "attention"})
    searcher = Searcher(spec, load_cluster("8xA100-80"), BF16, SearchConstraints())
    best = searcher.best()
    assert best is not None
    richer = next(
        one for one in searcher.feasible() if one.features > best.features and one.bounds.device < best.bounds.device
    )
    equal = dataclasses.replace(richer, seconds=best.seconds, sample_seconds=best.sample_seconds)
    assert best.cost("time") < equal.cost("time")


@pytest.mark.parametrize(
    ("model", "cluster", "more"),
    [
        ("vit-base/16", "1x8xH100", {}),
        ("vit-small/16", "4x8xH100", {"minimize": "nodes", "global_batch": 256}),
        ("vit-base/16", "1x8xRTX4090", {"nvme_path": "/nvme"}),
    ],
)
def test_settings_of_a_pareto_point_choose_its_plan(model: str, cluster: str, more: dict[str, object]) -> None:
    points = plan(model, cluster, precision="bf16", **more).pareto
    assert len({point.strategy for point in points}) > 1
    # The first, the last and every third: each is a search.
    for point in {id(point): point for point in (*points[::3], points[-1])}.values():
        nodes, _, rest = cluster.partition("x")
        assert point.nodes <= int(nodes)
        given = {name: value for name, value in more.items() if name == "global_batch"} | point.settings
        if "nvme" in str(point.settings["offload"]):
            given["nvme_path"] = more["nvme_path"]
        again = plan(model, f"{point.nodes}x{rest}", precision="bf16", all_nodes=True, **given)
        assert again.plan.time is not None
        assert again.plan.time.likely_s == pytest.approx(point.step_s)
        assert again.pareto[0].device_bytes == point.device_bytes
        assert again.considered == 1
