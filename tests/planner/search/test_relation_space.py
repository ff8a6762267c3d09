"""Relation parallelism in the search: sizes of groups, strategies, and plans with a given size."""

from __future__ import annotations

from typing import Any

import pytest

from translution.planner.common.errors import InputError
from translution.planner.config.loading import preset
from translution.planner.config.model import override
from translution.planner.config.training import TrainingSpec
from translution.planner.config.zero import OffloadMode
from translution.planner.costs.parameters import count_parameters
from translution.planner.hardware.cluster import load_cluster
from translution.planner.search.plan_search import SearchResult, plan, search_plan
from translution.planner.search.relation_space import group_sizes, search_strategies, suits_group
from translution.planner.search.searcher import Searcher
from translution.planner.search.space import SearchConstraints, Strategy

BF16 = TrainingSpec(precision="bf16", data="synthetic")
TABLES, PLAIN = preset("vit-base/16"), override(preset("vit-base/16"), operator="attention")


def strategies(cluster: str, model: Any = TABLES, **constraints: Any) -> list[Strategy]:
    return search_strategies(model, load_cluster(cluster), SearchConstraints(**constraints))[0]


def found(cluster: str, model: str = "vit-small/32", **constraints: Any) -> SearchResult:
    return search_plan(preset(model), load_cluster(cluster), BF16, SearchConstraints(**constraints))


@pytest.mark.parametrize(
    ("cluster", "given", "sizes"),
    [
        ("8xH100", None, [8, 4, 2]),
        ("8x8xH100", None, [8, 4, 64]),
        ("4x1xH100", None, [4, 2]),
        ("6xH100", None, [6, 3, 2]),
        ("1xH100", None, []),
        ("8x8xH100", 16, [16]),
        ("8x8xH100", 1, []),
        ("8x8xH100", 3, []),
    ],
)
def test_groups_are_a_node_a_part_of_it_or_all_ranks(cluster: str, given: int | None, sizes: list[int]) -> None:
    constraints = SearchConstraints(relation_parallel=given)
    assert group_sizes(TABLES, load_cluster(cluster), constraints) == sizes


def test_a_group_has_at_most_as_many_ranks_as_there_are_relations() -> None:
    # A grid of 2 x 2 with a class token has 9 offsets and 3 relations with the token.
    tiny = override(preset("vit-tiny/56"), image=112)
    assert tiny.geometry.relations == 12
    assert group_sizes(tiny, load_cluster("2x8xH100"), SearchConstraints()) == [8, 4, 2]


def test_relation_parallelism_is_tried_unless_something_else_is_asked_for() -> None:
    both = strategies("8xH100")
    assert {one.relation for one in both} == {True, False}
    assert Strategy(1, OffloadMode.NONE, relation=True) in both
    for alone in (
        strategies("8xH100", stage=3), strategies("8xH100", relation_parallel=1), strategies("1xH100"),
        strategies("8xH100", model=PLAIN), strategies("8xH100", engine="fsdp2"),
        strategies("2x8xH100", zero_overrides={"hpz_ranks": 8}),
    ):  # fmt: skip
        assert not any(one.relation for one in alone)
    given = strategies("8xH100", relation_parallel=8)
    assert given
    assert all(one.relation for one in given)
    assert {one.stage for one in given} == {1, 2, 3}
    assert {one.stage for one in strategies("8xH100", relation_parallel=8, stage=2)} == {2}


def test_one_replica_needs_no_higher_stage() -> None:
    def suits(stage: Any, offload: OffloadMode, replicas: int, given: Any = None) -> bool:
        return suits_group(Strategy(stage, offload, relation=True), replicas, "none", SearchConstraints(stage=given))

    assert suits(1, OffloadMode.NONE, 1)
    assert not suits(2, OffloadMode.NONE, 1)
    assert suits(2, OffloadMode.NONE, 2)
    assert suits(3, OffloadMode.CPU, 1)
    assert suits(2, OffloadMode.NONE, 1, given=2)


def test_blocks_inputs_stay_on_the_device_unless_the_host_is_asked_for() -> None:
    strategy = Strategy(1, OffloadMode.NONE, relation=True)
    assert suits_group(strategy, 2, "block", SearchConstraints())
    assert not suits_group(strategy, 2, "offload", SearchConstraints())
    assert suits_group(strategy, 2, "offload", SearchConstraints(checkpointing="offload"))
    assert suits_group(strategy._replace(relation=False), 2, "offload", SearchConstraints())


def test_the_search_varies_the_size_only_around_the_best_plan() -> None:
    """Every size needs simulations of its own for each batch and way of checkpointing."""
    constraints = SearchConstraints(global_batch=256, all_nodes=True)
    searcher = Searcher(preset("vit-small/32"), load_cluster("2x8xH100"), BF16, constraints)
    tried: dict[int, set[tuple[int, str]]] = {}
    for one in searcher.candidates:
        if one.strategy.relation:
            place = (one.run.training.micro_batch, one.run.model.checkpointing)
            tried.setdefault(one.run.parallel.relation, set()).add(place)
    assert set(tried) == {8, 4, 16}
    assert len(tried[8]) > 4
    assert len(tried[4]) == len(tried[16]) == 1


def test_a_given_size_is_taken_and_has_a_reason() -> None:
    result = found("2x8xH100", relation_parallel=4)
    chosen = result.plan
    assert (chosen.parallel.relation, chosen.run_config.replicas) == (4, chosen.world_size // 4)
    assert all("relation parallelism" in verdict.strategy for verdict in result.strategies)
    (knob,) = [knob for knob in result.knobs if knob.knob == "ranks that share relations"]
    assert (knob.value, knob.reason) == ("4", "given, or the only possible value")
    # Tiles are those of a rank's relations.
    relations = preset("vit-small/32").geometry.relations
    assert chosen.tile_relations is not None
    assert chosen.tile_relations <= -(-relations // 4)
    assert result.pareto[0].settings["relation_parallel"] == 4


def test_the_best_plan_without_groups_is_the_reason_for_them() -> None:
    """Half a node or a node is next best; where no size of a group pays, ZeRO's plan names the best size."""
    result = found("8xH100")
    (knob,) = [knob for knob in result.knobs if knob.knob == "ranks that share relations"]
    assert knob.value == str(result.plan.parallel.relation)
    assert knob.reason.startswith("next best is ")
    assert any("relation parallelism" in one.strategy and "groups of" in one.reason for one in result.strategies)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"relation_parallel": 3}, "relation_parallel: 3 is not allowed: must divide the number of ranks 8"),
        ({"relation_parallel": 0}, "plan: relation_parallel: 0 is not allowed"),
        ({"relation_parallel": 8, "engine": "fsdp2"}, "relation_parallel: 8 is not allowed: must be 1 with FSDP2"),
        ({"relation_parallel": 8, "quantized": True}, "quantized: True is not allowed with relation_parallel 8"),
        ({"relation_parallel": 8, "offload_ratio": 0.5}, "offload_ratio: 0.5 is not allowed with relation_parallel 8"),
        (
            {"relation_parallel": 8, "stage": 3, "zero_overrides": {"hpz_ranks": 4}},
            "relation_parallel: 8 is not allowed: must be 1 with hpz_ranks: 4",
        ),
    ],
    ids=str,
)
def test_a_size_that_cannot_be_is_one_line(given: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        plan("vit-small/32", "8xH100", **given)
    assert "\n" not in str(caught.value)


def test_a_model_without_tables_has_no_groups() -> None:
    with pytest.raises(InputError, match="relation_parallel: 2 is not allowed: must be 1 for a model without relation"):
        search_plan(PLAIN, load_cluster("8xH100"), BF16, SearchConstraints(relation_parallel=2))


def test_vit_large_16_with_relation_parallelism_on_eight_nodes() -> None:
    """A rank of 64 in groups of 8 holds an eighth of the tables, and their states are shared by eight replicas.

    Published in the specification of relation parallelism: 28 GB of parameters and gradients, 10 GB of states.
    """
    plan = found("8x8xH100", "vit-large/16", global_batch=512, all_nodes=True, relation_parallel=8, stage=1).plan
    count = count_parameters(preset("vit-large/16"))
    tables = count.components["relation tables"]
    own = tables / 8 + count.total - tables
    names = ("parameters", "gradients", "master parameters", "optimizer states")
    sizes = {name: plan.prediction.of(name) for name in names}
    assert sizes["parameters"] == pytest.approx(2 * own, rel=0.01)
    assert sizes["master parameters"] + sizes["optimizer states"] == pytest.approx(12 * own / 8, rel=0.01)
    assert 2 * sizes["parameters"] / 1e9 == pytest.approx(28, rel=0.05)
    assert (sizes["master parameters"] + sizes["optimizer states"]) / 1e9 == pytest.approx(10, rel=0.08)
    # By itself the search takes it: it is faster than what is best without.
    best, without = (found("8x8xH100", "vit-large/16", global_batch=512, **given).plan for given in
                     ({}, {"relation_parallel": 1}))  # fmt: skip
    assert best.parallel.relation > 1
    assert best.time and without.time and best.time.samples_per_s > without.time.samples_per_s


@pytest.mark.parametrize(
    ("model", "cluster", "given"),
    [
        # The fastest groups need more than the device has by the bound, and more when they are simulated.
        ("vit-base/16", "4xH100", {"offload": "none"}),
        ("vit-base/16", "2x8xH100", {"global_batch": 1024}),
        ("vit-small/32", "8xH100", {}),
    ],
)
def test_the_search_finds_nothing_slower_than_without_groups(model: str, cluster: str, given: dict[str, Any]) -> None:
    both, without = (found(cluster, model, **given, **more).plan for more in ({}, {"relation_parallel": 1}))
    assert both.time and without.time
    assert both.time.samples_per_s >= without.time.samples_per_s * 0.999
