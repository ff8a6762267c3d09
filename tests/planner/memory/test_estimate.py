"""The memory estimate: parameters as torch counts them, tiers as DeepSpeed uses them, few simulated events."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from translution.models import build
from translution.planner.common.errors import DoesNotFitError
from translution.planner.common.phases import Phase, Tier
from translution.planner.config.loading import preset
from translution.planner.config.model import ModelSpec, parse_model_spec
from translution.planner.config.run_config import RunConfig
from translution.planner.config.training import TrainingSpec
from translution.planner.costs.parameters import count_parameters
from translution.planner.hardware.cluster import ClusterSpec, load_cluster
from translution.planner.memory.estimate import MemoryEstimate, estimate_memory, gathered_floor_bytes, saved_bytes
from translution.planner.plans.build import make_plan
from translution.planner.plans.defaults import choose_tile, choose_zero, override_zero
from translution.planner.simulator.lifecycle import simulate
from translution.planner.simulator.network.model import SimulatedNetwork, replay
from translution.planner.simulator.network.ops import DtypeSizes

VIT = {"family": "vit", "image": [16, 12], "patch": 4, "channels": 1, "classes": 10, "dim": 32, "depth": 3, "heads": 2}
GPT = {"family": "gpt", "context": 12, "vocabulary": 50, "dim": 32, "depth": 3, "heads": 2}
OPERATORS: list[dict[str, Any]] = [
    {"operator": "attention"}, {"operator": "translution"}, {"operator": "translution", "roles": "kv"},
    {"operator": "translution", "roles": "q", "heads": 1, "head_dim": 32}, {"operator": "alpha"},
    {"operator": "alpha", "roles": "k"}, {"operator": "alpha", "roles": "v"}, {"operator": "bias"},
    {"operator": "shaw"}, {"operator": "absolute"}, {"operator": "absolute", "roles": "qv"},
    {"operator": "translution", "relative_layers": "every:2", "checkpointing": "block"},
]  # fmt: skip
GPUS = ClusterSpec(ranks_per_node=8, gpu="H100", device_memory_bytes=80 * 2**30)


def estimate_of(
    spec: ModelSpec, *, offload: str = "none", zero_overrides: dict[str, object] | None = None
) -> MemoryEstimate:
    tile = choose_tile(spec, 8)
    nvme = "/nvme" if "nvme" in offload else None
    zero = override_zero(choose_zero(spec, tile, 3, 8, offload=offload, nvme_path=nvme), zero_overrides or {})
    return estimate_memory(
        RunConfig(spec, GPUS, TrainingSpec(precision="bf16", micro_batch=1, data="synthetic"), zero, tile)
    )


@pytest.mark.parametrize("operator", OPERATORS, ids=str)
@pytest.mark.parametrize("base", [VIT, VIT | {"pool": "mean", "class_token": False}, GPT], ids=["vit", "mean", "gpt"])
def test_modules_have_torchs_parameters_in_torchs_order(base: dict[str, Any], operator: dict[str, Any]) -> None:
    """DeepSpeed fills sub-groups and buckets in this order."""
    spec = parse_model_spec(base | operator)
    network = SimulatedNetwork(spec, 1, DtypeSizes.of(4, "cpu"), 5)
    modules = [
        [p.numel() for p in module.parameters(recurse=False)] for module in build(spec, tile_relations=5).modules()
    ]
    assert [list(weights.numels) for weights in network.modules] == [numels for numels in modules if numels]
    assert sorted(map(id, network.construction)) == sorted(map(id, network.modules))


@pytest.mark.parametrize("offload", ["none", "cpu-optimizer", "cpu", "nvme-optimizer", "nvme"])
def test_breakdown_items_add_up_and_each_has_a_formula_and_a_source(offload: str) -> None:
    estimate = estimate_of(preset("vit-tiny/32"), offload=offload)
    assert {peak.phase for peak in estimate.peaks} == set(Phase) - {Phase.EVALUATION}
    for peak in estimate.peaks:
        assert peak.bytes == sum(item.bytes for item in peak.breakdown)
        assert all(item.bytes > 0 and item.source and item.formula != item.name for item in peak.breakdown)
    assert MemoryEstimate.model_validate_json(estimate.model_dump_json()) == estimate
    assert ("nvme" in estimate.tiers) == ("nvme" in offload)


def test_each_tier_holds_the_states_that_deepspeed_puts_there() -> None:
    """Bytes per parameter of a rank's partition; source: deepspeed, stage3.py."""
    spec = preset("vit-base/16")
    network = SimulatedNetwork(spec, 1, DtypeSizes.of(2, "cuda"), choose_tile(spec, 8))
    share = sum(-(-group // 8) for weights in network.modules for group in weights.numels)
    states = ("parameters", "gradients", "fp32 gradients", "master parameters", "optimizer states")

    def per_parameter(estimate: MemoryEstimate, *tiers: Any) -> float:
        return sum(estimate.of(name, Phase.BETWEEN, tier) for name in states for tier in tiers) / share

    assert per_parameter(estimate_of(spec), Tier.DEVICE) == pytest.approx(16)
    host = estimate_of(spec, offload="cpu-optimizer", zero_overrides={"offload_optimizer.pin_memory": False})
    assert (per_parameter(host, Tier.DEVICE), per_parameter(host, Tier.HOST)) == (pytest.approx(2), pytest.approx(18))
    both = estimate_of(spec, offload="cpu", zero_overrides={"offload_optimizer.pin_memory": False})
    assert per_parameter(both, Tier.HOST, Tier.PINNED) == pytest.approx(
        20, rel=0.1
    )  # A flat buffer, rounded up to a power of two.
    nvme = estimate_of(spec, offload="nvme")
    assert per_parameter(nvme, Tier.NVME) == pytest.approx(18, rel=0.01)
    assert per_parameter(nvme, Tier.HOST) == pytest.approx(2, rel=0.01)
    assert per_parameter(nvme, Tier.DEVICE) < 0.05


def test_pinned_tensors_are_as_large_as_torchs_allocator_makes_them() -> None:
    estimate = estimate_of(preset("vit-tiny/32"), offload="cpu-optimizer")
    sizes = [item.bytes for item in estimate.peak(Phase.BETWEEN, Tier.PINNED).breakdown]  # type: ignore[union-attr]  # this plan pins memory
    assert len(sizes) == 2
    assert estimate.of("gradients", Phase.BETWEEN, "pinned").bit_count() == 1


def test_reuse_keeps_every_tile_and_prefetch_stays_within_the_live_limit() -> None:
    spec = preset("vit-tiny/32")
    one = estimate_of(spec)
    tile = 2 * choose_tile(spec, 8) * 192 * 192 * 2  # type: ignore[operator]  # not None: Translution has tiles
    # Each matrix of a tile of logits is copied out of the buffer that both were gathered into.
    assert one.of("gathered parameters", "forward") == 2 * tile
    everything = estimate_of(spec, zero_overrides={"max_reuse_distance_elements": 10**9})
    tables = 3 * 6 * 172 * 192 * 192 * 2
    assert tables < everything.of("gathered parameters", "backward") < 1.1 * tables
    elements = tile // 2
    ahead = estimate_of(spec, zero_overrides={"prefetch_bucket_elements": elements, "max_live_elements": 2 * elements})
    assert 2 * tile < ahead.of("gathered parameters", "forward") <= 4 * tile


def test_the_error_for_a_tile_that_does_not_fit_names_one_that_does() -> None:
    spec = preset("vit-large/16")
    training = TrainingSpec(precision="bf16", micro_batch=1, data="synthetic")
    assert gathered_floor_bytes(spec, training, 732) == 4 * 732 * 1024 * 1024 * 2
    small = load_cluster("8x8xH100").model_copy(update={"device_memory_bytes": 5 * 2**30})
    with pytest.raises(DoesNotFitError, match=r"every rank gathers a full tile of 732 relations.*tile_relations: \d+"):
        make_plan(spec, small, training, tile_relations=732)


def test_the_estimate_saves_as_many_bytes_as_the_model_alone() -> None:
    spec = preset("vit-tiny/32")
    assert estimate_of(spec).saved_bytes == saved_bytes(spec, 1, DtypeSizes.of(2, "cuda"))


def test_the_largest_preset_is_replayed_in_few_events() -> None:
    """20,000 events take 40 ms; benchmarks/accuracy.py measures the time."""
    spec, cluster = preset("gpt-large/1024"), load_cluster("64x8xH100")
    tile = choose_tile(spec, cluster.world_size)
    training = TrainingSpec(precision="bf16", micro_batch=1, data="synthetic")
    zero = choose_zero(spec, tile, 3, cluster.world_size)
    memory = simulate(RunConfig(spec, cluster, training, zero, tile), record=True).memory
    assert 5_000 < sum(len(tier.events or []) for tier in memory.tiers.values()) < 20_000


def test_planning_for_512_ranks_needs_no_gpu() -> None:
    plan = make_plan(
        preset("vit-large/16"),
        load_cluster("64x8xH100"),
        TrainingSpec(precision="bf16", micro_batch=1, data="synthetic"),
    )
    assert not torch.cuda.is_initialized()
    low, high = plan.prediction.device_interval_bytes or (0, 0)
    assert 2 * 2**30 < low < plan.prediction.peak_bytes < high < 16 * 2**30
    shown = plan.prediction.shown_interval_bytes or (0, 0)
    assert low < shown[0]
    assert high < shown[1]


@pytest.mark.parametrize("checkpointing", ["none", "block", "offload"])
@pytest.mark.parametrize("implementation", ["grouped", "gather"])
def test_bytes_saved_by_a_deep_network_follow_from_shallow_ones(checkpointing: str, implementation: Any) -> None:
    fields = {"family": "gpt", "context": 12, "vocabulary": 40, "dim": 24, "depth": 9, "heads": 3, "c1": 2, "c2": 3}
    for operator in ("translution", "alpha", "attention", "bias", "shaw", "absolute"):
        spec = parse_model_spec(fields | {"operator": operator, "checkpointing": checkpointing})
        replayed = replay(spec, 3, DtypeSizes.of(2, "cuda"), implementation=implementation).saved_bytes
        assert saved_bytes(spec, 3, DtypeSizes.of(2, "cuda"), implementation) == replayed


def test_the_first_step_on_nvme_also_holds_one_sub_groups_states() -> None:
    """Not those of all sub-groups: the training patch releases each when it is copied."""
    spec = preset("vit-small/16")
    estimate = estimate_of(spec, offload="nvme")
    first, later = (estimate.bytes_of(phase, Tier.HOST) for phase in (Phase.FIRST_STEP, Phase.STEP))
    states = 8 * count_parameters(spec).total // 8
    assert 0 < first - later < states / 20
    assert estimate_of(spec).bytes_of(Phase.FIRST_STEP) == estimate_of(spec).bytes_of(Phase.STEP)
