"""The memory of ranks that share out the relations: states of their own relations, and the rank that holds the most."""

from __future__ import annotations

from typing import Any

import pytest

from translution.planner.analysis.estimate_model import estimate
from translution.planner.common.errors import InputError
from translution.planner.common.phases import Phase
from translution.planner.config.loading import preset
from translution.planner.config.model import ModelSpec, parse_model_spec
from translution.planner.config.parallel import ParallelSpec, deal_relations
from translution.planner.config.run_config import RunConfig
from translution.planner.config.training import TrainingSpec
from translution.planner.costs.parameters import TABLES, parameter_groups
from translution.planner.hardware.cluster import load_cluster, local_cpu_cluster
from translution.planner.memory.estimate import MemoryEstimate, estimate_memory, evaluation_peaks, gathered_floor_bytes
from translution.planner.plans.defaults import choose_zero

GPT = {"family": "gpt", "context": 27, "vocabulary": 50, "dim": 32, "depth": 3, "heads": 2}
TILE = 4


def run_config(spec: ModelSpec, cluster: Any, group: int, stage: Any, **training: Any) -> RunConfig:
    values = {"precision": "bf16", "micro_batch": 4, "data": "synthetic"} | training
    zero = choose_zero(spec, TILE, stage, cluster.world_size, relation_ranks=group)
    return RunConfig(spec, cluster, TrainingSpec(**values), zero, TILE, ParallelSpec(relation=group))


def elements(spec: ModelSpec, group: int, place: int) -> int:
    """Elements of a rank's parameters, counted relation by relation."""
    owned = deal_relations(spec.geometry, group).count(place)
    groups = parameter_groups(spec)
    tables = sum(each.total // each.shape[0] for each in groups if each.component == TABLES)
    return owned * tables + sum(each.total for each in groups if each.component != TABLES)


@pytest.mark.parametrize("operator", ["translution", "alpha"])
@pytest.mark.parametrize(("group", "replicas"), [(4, 1), (4, 2), (2, 4), (8, 1)])
def test_states_are_of_the_relations_that_a_rank_owns_and_shared_among_replicas(
    operator: str, group: int, replicas: int
) -> None:
    spec, cluster = parse_model_spec(GPT | {"operator": operator}), load_cluster(f"{group * replicas}xH100")
    for rank in range(group * replicas):
        own = elements(spec, group, rank % group)
        first, second = (estimate_memory(run_config(spec, cluster, group, stage), rank) for stage in (1, 3))
        tensors = 1000  # Every tensor, or the flat buffer, is padded.
        assert 0 <= first.of("parameters") - 2 * own <= 2 * tensors
        assert 0 <= first.of("optimizer states") - 8 * own // replicas <= 8 * tensors
        assert 0 <= second.of("optimizer states") - 8 * own // replicas <= 8 * tensors
        persistent = second.of("persistent parameters")
        assert 0 <= second.of("parameters") + persistent - 2 * own // replicas <= persistent + 2 * tensors


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("group", [2, 4])
def test_the_estimate_without_a_rank_is_that_of_the_rank_that_holds_the_most(stage: Any, group: int) -> None:
    """27 relations on 4 ranks: three have 7 of them, one has 6; the numbers of pairs differ, too."""
    run = run_config(parse_model_spec(GPT), local_cpu_cluster(1).model_copy(update={"nodes": 4}), group, stage)
    ranks = [estimate_memory(run, rank) for rank in range(4)]
    assert len({each.resident_bytes for each in ranks}) > 1
    worst = estimate_memory(run)
    for phase in set(Phase) - {Phase.EVALUATION}:
        highest = max(each.bytes_of(phase) for each in ranks)
        # Stages 1 and 2 take the replica with the most for each of several terms.
        assert highest <= worst.bytes_of(phase) <= 1.02 * highest
    assert worst.saved_bytes == max(each.saved_bytes for each in ranks)
    evaluated = [evaluation_peaks(run, 2, rank)[0].bytes for rank in range(4)]
    assert max(evaluated) <= evaluation_peaks(run, 2)[0].bytes <= 1.02 * max(evaluated)


def test_items_say_that_replicas_share_them() -> None:
    spec, cluster = parse_model_spec(GPT), load_cluster("8xH100")

    def formula(group: int) -> str:
        peak = estimate_memory(run_config(spec, cluster, group, 3)).peak(Phase.BETWEEN)
        assert peak is not None
        return next(item.formula for item in peak.breakdown if item.name == "optimizer states")

    assert "1/ranks of each tensor" in formula(1)
    assert "1/replicas of each tensor" in formula(4)
    backward = estimate_memory(run_config(spec, cluster, 4, 3, micro_batch=64)).peak(Phase.BACKWARD)
    assert backward is not None
    assert backward.of("exchanges of the relation group") > 0


def test_a_rank_gathers_no_more_than_its_own_relations() -> None:
    spec, training = preset("vit-base/16"), TrainingSpec(precision="bf16", micro_batch=1, data="synthetic")
    # 732 relations, 92 of them on the first of eight ranks.
    assert gathered_floor_bytes(spec, training, None, 8) == 4 * 92 * 768 * 768 * 2
    assert gathered_floor_bytes(spec, training, None, 1) == 4 * 732 * 768 * 768 * 2


def test_estimate_has_the_memory_of_a_rank_in_a_group() -> None:
    def stages(group: int) -> dict[int, MemoryEstimate]:
        costs = estimate("vit-base/16", cluster="8xH100", relation_parallel=group)
        assert costs.document()["per_rank"].get("relation_parallel", 1) == group
        return costs.stages

    whole, shared = stages(1), stages(8)
    assert shared[0].of("parameters") < 0.14 * whole[0].of("parameters")
    assert shared[1].peak_bytes < 0.6 * whole[1].peak_bytes
    with pytest.raises(InputError, match="relation_parallel: 2 is not allowed: must be 1 without a cluster"):
        estimate("vit-base/16", relation_parallel=2)
    with pytest.raises(InputError, match="relation_parallel: 3 is not allowed: must divide the number of ranks 8"):
        estimate("vit-base/16", cluster="8xH100", relation_parallel=3)
