"""Times of relation parallelism: what travels in a group, the rates of its groups, and a step's parts by hand."""

from __future__ import annotations

from typing import Any

import pytest

from translution.planner.config.loading import preset
from translution.planner.config.model import override
from translution.planner.config.parallel import ParallelSpec, deal_relations, owned_geometry
from translution.planner.config.run_config import RunConfig
from translution.planner.config.training import TrainingSpec
from translution.planner.costs.parameters import TABLES, count_parameters
from translution.planner.costs.relation_traffic import relation_parallel_traffic
from translution.planner.hardware.cluster import MeasuredRates, Transfer, load_cluster
from translution.planner.plans.defaults import choose_tile, choose_zero
from translution.planner.timing.rates import Rates
from translution.planner.timing.relation_time import (
    Exchanged,
    exchange_seconds,
    exchanged,
    group_rates,
    replica_rates,
    spanned_nodes,
)
from translution.planner.timing.step_time import StepTime, estimate_step_time, evaluation_seconds


def run_of(
    group: int, cluster: str = "8xH100", stage: Any = 1, model: dict[str, Any] | None = None, **training: Any
) -> RunConfig:
    spec, where = override(preset("vit-base/16"), **(model or {})), load_cluster(cluster)
    tile = choose_tile(spec, where.world_size)
    zero = choose_zero(spec, tile, stage, where.world_size)
    values = {"precision": "bf16", "micro_batch": 1, "data": "synthetic"} | training
    return RunConfig(spec, where, TrainingSpec(**values), zero, tile, ParallelSpec(relation=group))


def parts(time: StepTime) -> dict[str, float]:
    return {entry.name: entry.likely_s for entry in time.breakdown}


@pytest.mark.parametrize(
    "changes",
    [
        {}, {"roles": "kv"}, {"roles": "q"}, {"roles": "v"}, {"dropout": 0.1}, {"operator": "alpha"},
        {"operator": "alpha", "roles": "k"}, {"relative_layers": "first:2", "other_layers": "alpha"},
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("ranks", [2, 8])
def test_forward_and_backward_send_what_the_operator_sends(changes: dict[str, Any], ranks: int) -> None:
    spec = override(preset("vit-small/32"), **changes)
    owners = deal_relations(spec.geometry, ranks)
    pairs = [owned_geometry(spec.geometry, owners, rank).total_pairs for rank in range(ranks)]
    most = pairs.index(max(pairs))
    forward, backward = exchanged(spec, ranks, 3, 2)
    assert forward.total + backward.total == relation_parallel_traffic(spec, ranks=ranks, batch=3, rank=most).total
    assert min(*forward, *backward) > 0


def test_a_group_on_one_node_exchanges_over_its_links() -> None:
    """Bytes that a rank sends at 75% of 450 GB/s, 30 us for each collective, and four copies at 75% of 3.35 TB/s."""
    rates = Rates(load_cluster("2x8xH100"), "bf16")
    seconds = 12e9 / (0.75 * 450e9) + 20 * 30e-6 + 4 * 12e9 / (0.75 * 3.35e12)
    assert exchange_seconds(Exchanged(5_000_000_000, 7_000_000_000, 20), 8, rates) == pytest.approx(seconds)
    assert exchange_seconds(Exchanged(5_000_000_000, 7_000_000_000, 20), 4, rates) == pytest.approx(seconds)


def test_a_group_on_several_nodes_exchanges_over_the_network() -> None:
    """Of 15 other ranks 8 are on the other node. What is gathered crosses once, an all-to-all for every rank."""
    cluster = load_cluster("2x8xH100")
    assert [spanned_nodes(cluster, ranks) for ranks in (4, 6, 8, 12, 16)] == [1, 2, 1, 2, 2]
    rates = group_rates(Rates(cluster, "bf16"), 16)
    adapters = 8 * 50e9 * 0.7
    # A rank that sends 15 GB has a sixteenth of a tensor of 16 GB, of which a node receives half.
    assert 16e9 / rates.collective("all_gather").bytes_per_s == pytest.approx(15e9 / (0.75 * 450e9), rel=1e-6)
    assert 16e9 / rates.collective("all_to_all").bytes_per_s == pytest.approx(8 * 8e9 / adapters)


def test_replicas_share_the_adapters_of_their_nodes() -> None:
    """With G = 8, each of the eight GPUs of a node averages its own tables with seven others, over one adapter each."""
    rates = Rates(load_cluster("8x8xH100"), "bf16")
    assert replica_rates(rates, 1) is rates
    assert replica_rates(rates, 8).collective("all_gather").bytes_per_s == pytest.approx(50e9 * 0.7 * 8 / 7)
    # With G = 4 two GPUs of a node are replicas: each node receives 7/8 of four tensors.
    assert replica_rates(rates, 4).collective("all_gather").bytes_per_s == pytest.approx(2 * 50e9 * 0.7 * 8 / 7)
    # With G = 16 a replica's group is on two nodes, of which only one has the same place.
    assert replica_rates(rates, 16).cluster.nodes == 4


def test_a_rank_without_replicas_averages_over_nobody() -> None:
    measured = MeasuredRates(reduce_scatter=Transfer(latency_s=1.0, bytes_per_s=1.0))
    cluster = load_cluster("8xH100").model_copy(update={"measured": measured})
    rates = Rates(cluster, "bf16")
    assert rates.collective("reduce_scatter").latency_s == 1.0
    assert replica_rates(rates, 8).collective("reduce_scatter").latency_s < 1e-4
    assert replica_rates(rates, 4).collective("reduce_scatter").latency_s == 1.0


def test_tokens_travel_instead_of_tables() -> None:
    zero3, zero1 = (estimate_step_time(run_of(1, stage=stage)) for stage in (3, 1))
    group = estimate_step_time(run_of(8))
    assert group.likely_s < zero3.likely_s / 4
    assert "parameter gathers" in parts(zero3).keys() - parts(group).keys()
    own, shared = "exchanges of the relation group", "shared gradients in the relation group"
    assert {own, shared} <= parts(group).keys() - parts(zero3).keys()
    # ZeRO-3 moves 82 GB, the group 0.2 GB (docs/relation-parallel.md).
    moved = parts(zero3)["parameter gathers"] + parts(zero3)["gradient reduction"]
    assert parts(group)[own] < moved / 50
    # An all-reduce of the other parameters, twice 7/8 of them, and of each of their tensors by itself; and the scaling
    # of all gradients of a rank, read and written at 75% of 3.35 TB/s.
    count = count_parameters(preset("vit-base/16"))
    tables = count.components[TABLES]
    others = 2 * 7 / 8 * 2 * (count.total - tables) / (0.75 * 450e9)
    scaling = 2 * 2 * (tables / 8 + count.total - tables) / (0.75 * 3.35e12)
    assert others + scaling < parts(group)[shared] < others + scaling + 250 * 30e-6
    # An eighth of the tables is updated on every rank, as under ZeRO; and each rank calls an eighth of the tiles.
    assert parts(group)["optimizer update"] == pytest.approx(parts(zero3)["optimizer update"], rel=0.1)
    assert parts(group)["engine"] < parts(zero1)["engine"] / 3


def test_products_of_relations_are_taller_in_a_group() -> None:
    """A table is read once for the samples of eight ranks; with many samples each, nothing is gained."""

    def computed(batch: int) -> list[float]:
        times = [parts(estimate_step_time(run_of(ranks, stage=3, micro_batch=batch))) for ranks in (1, 8)]
        return [time["forward"] + time["backward"] for time in times]

    alone, group = computed(1)
    assert group < alone / 4
    alone, group = computed(64)
    assert group == pytest.approx(alone, rel=0.05)


def test_a_step_exchanges_with_every_micro_batch_and_again_when_it_recomputes() -> None:
    name = "exchanges of the relation group"
    one, two = (parts(estimate_step_time(run_of(8, gradient_accumulation_steps=n)))[name] for n in (1, 2))
    assert two == pytest.approx(2 * one)
    again = parts(estimate_step_time(run_of(8, model={"checkpointing": "block"})))[name]
    assert 1.2 * one < again < 1.6 * one
    # An evaluation exchanges, and gathers no table.
    assert evaluation_seconds(run_of(8), 4)[1] < evaluation_seconds(run_of(1, stage=3), 4)[1] / 2


def test_a_group_over_the_network_is_slower_than_one_on_a_node_with_large_batches() -> None:
    times = [estimate_step_time(run_of(ranks, "8x8xH100", micro_batch=32)).likely_s for ranks in (8, 64)]
    assert times[0] < times[1]
