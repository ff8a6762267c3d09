"""Relation parallelism in the search space: its strategies, and the sizes of groups to try."""

from __future__ import annotations

from ..config.model import ModelSpec
from ..config.parallel import ParallelSpec
from ..config.run_config import RunConfig
from ..config.training import TrainingSpec
from ..config.zero import OffloadMode, ZeroSpec
from ..costs.relation_traffic import has_relation_tables
from ..hardware.cluster import ClusterSpec
from .space import ZERO_PLUS_PLUS, SearchConstraints, Strategy, list_strategies

MOST_GROUPS = 3
"""At most this many sizes of a relation group are tried on a number of nodes."""


def check_group_size(
    spec: ModelSpec, cluster: ClusterSpec, training: TrainingSpec, constraints: SearchConstraints
) -> None:
    """Refuse a given size of relation groups that model, cluster or engine cannot have.

    Args:
        spec: the model.
        cluster: all available nodes.
        training: precision and optimizer.
        constraints: may fix the size.

    Raises:
        InputError: naming the size and what is allowed.
    """
    if constraints.relation_parallel is not None:
        groups = ParallelSpec(relation=constraints.relation_parallel)
        RunConfig(spec, cluster, training, ZeroSpec(engine=constraints.engine), parallel=groups)


def group_sizes(spec: ModelSpec, cluster: ClusterSpec, constraints: SearchConstraints) -> list[int]:
    """Return the sizes of relation groups to try on a cluster, without 1: a node, half of it, all ranks, and others.

    Larger groups need less memory and send more.

    Args:
        spec: the model.
        cluster: all ranks of a candidate.
        constraints: may fix the size.
    """
    most, given = min(cluster.world_size, spec.geometry.relations), constraints.relation_parallel
    if given is not None:
        return [given] if 1 < given <= most and cluster.world_size % given == 0 else []
    node = cluster.ranks_per_node
    parts = [size for size in range(node // 2, 1, -1) if node % size == 0]
    several = [node * count for count in range(2, cluster.nodes) if cluster.nodes % count == 0]
    sizes = dict.fromkeys((node, *parts[:1], cluster.world_size, *parts[1:], *several))
    return [size for size in sizes if 1 < size <= most][:MOST_GROUPS]


def search_strategies(
    spec: ModelSpec, cluster: ClusterSpec, constraints: SearchConstraints
) -> tuple[list[Strategy], dict[Strategy, str]]:
    """Return the strategies to try with and without relation parallelism, and the infeasible ones with the reason.

    Relation parallelism is not tried where a stage or a part of ZeRO++ is fixed, which asks for ZeRO over all ranks,
    unless a size of the groups is given.

    Args:
        spec: the model.
        cluster: all available nodes.
        constraints: what the user fixes.

    Raises:
        InputError: for an unknown offload mode, or what FSDP2 does not have.
    """
    chosen, infeasible = list_strategies(constraints, cluster)
    given = constraints.relation_parallel
    if given == 1 or constraints.engine != "deepspeed":
        return chosen, infeasible
    if given is None:
        zero_only = constraints.stage is not None or set(ZERO_PLUS_PLUS) & set(constraints.zero_overrides)
        if zero_only or not has_relation_tables(spec) or cluster.world_size == 1:
            return chosen, infeasible
    stages = (1, 2, 3) if constraints.stage is None else (constraints.stage,)
    found = [
        strategy._replace(relation=True)
        for strategy in chosen
        if strategy.stage in stages and not (strategy.hpz or strategy.ratio < 1)
    ]
    if given is None:
        # Groups leave so little to ZeRO that the host helps stages 2 and 3 no more than stage 1.
        tried = [one for one in found if one.stage == 1 or one.offload is not OffloadMode.CPU_OPTIMIZER]
        return chosen + tried, infeasible
    without = {strategy: reason for strategy, reason in infeasible.items() if not strategy.hpz}
    return found, {strategy._replace(relation=True): reason for strategy, reason in without.items()}


def suits_group(strategy: Strategy, replicas: int, checkpointing: str, constraints: SearchConstraints) -> bool:
    """Return whether a strategy is worth a try with a number of replicas.

    With one replica ZeRO has nothing to partition: stage 1 is as good as the higher ones, unless they offload what it
    does not. Inputs of blocks are too small, next to what a group exchanges, to be worth the host's memory.

    Args:
        strategy: the stage and the offload mode.
        replicas: ranks that own the same relations, D.
        checkpointing: that of the activations.
        constraints: may fix stage and checkpointing.
    """
    if not strategy.relation:
        return True
    if checkpointing == "offload" and constraints.checkpointing is None:
        return False
    below = (OffloadMode.NONE, OffloadMode.CPU_OPTIMIZER)
    return replicas > 1 or constraints.stage is not None or strategy.stage == 1 or strategy.offload not in below
