"""The settings of a candidate, with which a search finds it and no other."""

from __future__ import annotations

import pytest

from translution.planner.search.plan_search import plan


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
        again = plan(model, f"{point.nodes}x{rest}", precision="bf16", all_nodes=True, **(more | point.settings))
        assert again.plan.time is not None
        assert again.plan.time.likely_s == pytest.approx(point.step_s)
        assert again.pareto[0].device_bytes == point.device_bytes
        assert again.considered == 1
