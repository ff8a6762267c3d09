"""What a rank sends on its node and on the network, by hand."""

from __future__ import annotations

from typing import Any

import pytest

from translution.planner.config.loading import preset
from translution.planner.config.model import ModelSpec, override
from translution.planner.config.parallel import ParallelSpec
from translution.planner.config.run_config import RunConfig
from translution.planner.config.training import TrainingSpec
from translution.planner.config.zero import ZeroSpec
from translution.planner.costs.parameters import TABLES, count_parameters
from translution.planner.costs.relation_traffic import relation_parallel_traffic
from translution.planner.hardware.cluster import load_cluster
from translution.planner.timing.traffic import traffic_rows

BASE = preset("vit-base/16")
ZERO3, HPZ, MICS = "ZeRO-3", "ZeRO-3 with hpZ", "MiCS, sharded within a node"


def sent(
    cluster: str, group: int = 1, model: ModelSpec = BASE, stage: Any = 3, **training: Any
) -> dict[str, tuple[int, int]]:
    values = {"precision": "bf16", "micro_batch": 8, "data": "synthetic"} | training
    zero, parallel = ZeroSpec(stage=stage), ParallelSpec(relation=group)
    run = RunConfig(model, load_cluster(cluster), TrainingSpec(**values), zero, parallel=parallel)
    return {row.strategy: (row.node_bytes, row.network_bytes) for row in traffic_rows(run)}


def test_ways_to_share_out_a_model_on_eight_nodes_by_hand() -> None:
    """B = 2 bytes of 15.6 G parameters. A node receives 7/8 of B in a pass, each of its GPUs an eighth of that."""
    count = count_parameters(BASE)
    size, tables = 2 * count.total, 2 * count.components[TABLES]
    rows = sent("8x8xH100")
    far = size * 7 / 8 / 8
    assert rows[ZERO3] == pytest.approx((3 * (size * 63 / 64 - far), 3 * far), rel=1e-6)
    # hpZ: the gathers of backward stay on the node.
    assert rows[HPZ] == pytest.approx((2 * (size * 63 / 64 - far) + size * 7 / 8, 2 * far), rel=1e-6)
    # MiCS: three passes on the node, and an average of each rank's eighth over the nodes.
    assert rows[MICS] == pytest.approx((3 * size * 7 / 8, 2 * 7 / 8 * size / 8), rel=1e-6)
    # Groups of a node: their exchanges and the average of the other gradients; then ZeRO-1 over eight replicas.
    exchanged, others = relation_parallel_traffic(BASE, ranks=8, batch=8).total, size - tables
    near, network = rows["relation parallelism in groups of 8, ZeRO-1"]
    assert near == pytest.approx(exchanged + 2 * 7 / 8 * others, rel=0.02)
    assert network == pytest.approx(2 * 7 / 8 * (tables / 8 + others), rel=1e-6)


def test_one_node_sends_nothing_over_the_network() -> None:
    rows = sent("8xH100")
    assert set(rows) == {ZERO3, "relation parallelism in groups of 8, ZeRO-1"}
    assert all(network == 0 for _, network in rows.values())
    assert rows[ZERO3][0] == pytest.approx(3 * 2 * count_parameters(BASE).total * 7 / 8)


def test_a_group_on_all_nodes_sends_most_of_its_exchanges_over_the_network() -> None:
    """Of 63 other GPUs 56 are on other nodes, and there is no replica."""
    near, network = sent("8x8xH100", 64, stage=1)["relation parallelism in groups of 64, ZeRO-1"]
    exchanged = relation_parallel_traffic(BASE, ranks=64, batch=8).total
    assert network == pytest.approx(exchanged * 56 / 63, rel=0.05)
    assert near < network / 4


def test_accumulation_and_recomputation_send_more() -> None:
    one, two = sent("2x8xH100"), sent("2x8xH100", gradient_accumulation_steps=2)
    assert two[ZERO3][1] == pytest.approx(2 * one[ZERO3][1])
    # Once a step: hpZ's first gather, MiCS's average, and that of ZeRO-1.
    assert two[HPZ][1] == pytest.approx(1.5 * one[HPZ][1])
    assert two[MICS][1] == one[MICS][1]
    name = "relation parallelism in groups of 8, ZeRO-1"
    assert two[name][1] == one[name][1]
    assert two[name][0] == pytest.approx(2 * one[name][0])
    again = sent("2x8xH100", model=override(BASE, checkpointing="block"))
    assert again[ZERO3][1] == pytest.approx(4 / 3 * one[ZERO3][1], rel=1e-6)
    assert 1 < again[name][0] / one[name][0] < 1.5


def test_a_plan_with_groups_is_shown_with_its_own_stage() -> None:
    """Over eight replicas ZeRO-2 reduces with both micro-batches, and ZeRO-3 gathers for four passes besides."""
    far = []
    for stage in (1, 2, 3):
        rows = sent("8x8xH100", 8, stage=stage, gradient_accumulation_steps=2)
        far.append(rows[f"relation parallelism in groups of 8, ZeRO-{stage}"][1])
    assert [size / far[0] for size in far] == pytest.approx([1, 1.5, 3])


def test_nothing_is_compared_without_tables_or_other_ranks() -> None:
    assert not sent("1xH100")
    assert not sent("8xH100", model=override(BASE, operator="attention"))
