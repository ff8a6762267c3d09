"""The search: scenarios computed by hand, properties of every plan, and its advice if nothing fits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers.chance import examples
from hypothesis import example, given
from hypothesis import strategies as st

from translution.cli.main import run
from translution.planner.common.errors import InputError
from translution.planner.common.phases import Tier
from translution.planner.common.units import GIB
from translution.planner.config.loading import load_model, preset
from translution.planner.config.model import override
from translution.planner.config.run_config import RunConfig
from translution.planner.config.training import TrainingSpec
from translution.planner.costs.parameters import count_parameters
from translution.planner.hardware.cluster import ClusterSpec, load_cluster
from translution.planner.memory.estimate import estimate_memory
from translution.planner.memory.upper_bound import bound_memory
from translution.planner.plans.defaults import choose_tile, choose_zero
from translution.planner.search.plan_search import NoPlanFits, SearchResult, search_plan
from translution.planner.search.searcher import Searcher
from translution.planner.search.space import SearchConstraints

BF16 = TrainingSpec(precision="bf16", data="synthetic")


def found(model: str, cluster: str, **constraints: Any) -> SearchResult:
    return search_plan(preset(model), load_cluster(cluster), BF16, SearchConstraints(**constraints))


def fits(result: SearchResult, headroom: float = 0.08) -> None:
    """Assert that the plan leaves the headroom on the device, on the node's host and on its drives."""
    plan = result.plan
    cluster, memory = plan.cluster, plan.prediction
    assert memory.peak_bytes <= cluster.device_memory_bytes * (1 - headroom)
    assert memory.host_bytes * cluster.ranks_per_node <= cluster.host_memory_bytes * (1 - headroom)
    if cluster.nvme_bytes:
        assert memory.highest(Tier.NVME) * cluster.ranks_per_node <= cluster.nvme_bytes * (1 - headroom)


def test_vit_base_16_on_eight_a100_needs_no_offload() -> None:
    # 15,608,200,168 parameters of 16 bytes: bf16 parameter 2, bf16 gradient 2, fp32 master 4, Adam's moments 8.
    # A rank's eighth is 31.2 GB = 29.1 GiB of 80 GiB, which leaves room for a step's activations.
    result = found("vit-base/16", "8xA100-80", global_batch=512)
    plan = result.plan
    assert (plan.zero.stage, plan.zero.offloads) == (3, False)
    states = sum(
        plan.prediction.of(name) for name in ("parameters", "gradients", "master parameters", "optimizer states")
    )
    assert states == pytest.approx(16 * 15_608_200_168 / 8, rel=1e-4)
    assert plan.training.global_batch(8) == 512
    fits(result)


def test_vit_base_16_on_one_h200_needs_more_host_than_its_share_of_a_node() -> None:
    # 16 bytes x 15.6 G = 233 GiB do not fit in 140 GiB. With the optimizer offloaded, the device holds 2 bytes per
    # parameter = 29 GiB, and the host 4 + 4 + 8 and 2 in the accumulator: 262 GiB before pinning, but a GPU's share
    # of the node's 2 TiB is 256 GiB.
    with pytest.raises(NoPlanFits) as error:
        found("vit-base/16", "1xH200")
    reasons = {verdict.strategy: verdict.reason for verdict in error.value.strategies}
    assert "on the device, 129 GiB usable" in reasons["ZeRO-3, no offload"]
    assert "of a node's host memory, 236 GiB usable" in reasons["ZeRO-3, optimizer on the host"]
    assert reasons["ZeRO-3, all on NVMe"].startswith("no path")
    kinds = [advice.kind for advice in error.value.advice]
    assert kinds == ["host memory or NVMe", "nodes", "input", "width"]


def test_vit_base_16_on_one_h200_trains_with_a_roomy_host() -> None:
    cluster = load_cluster("1xH200").model_copy(update={"host_memory_bytes": 512 * GIB})
    result = search_plan(preset("vit-base/16"), cluster, BF16, SearchConstraints(global_batch=64))
    assert result.plan.zero.offload_optimizer.device == "cpu"
    assert result.plan.zero.offload_optimizer.ratio < 1  # The part that fits on the device stays there.
    fits(result)


def test_vit_large_16_needs_two_nodes_of_eight_h100() -> None:
    # 55.5 G parameters of 16 bytes: 51.7 GiB per rank on 16 ranks, 12.9 GiB on 64; on 8 ranks 103 GiB.
    for cluster, states in (("2x8xH100", 51.7), ("8x8xH100", 12.9)):
        result = found("vit-large/16", cluster, global_batch=512, all_nodes=True, relation_parallel=1)
        plan = result.plan
        assert (plan.zero.stage, plan.zero.offloads) == (3, False)
        names = ("parameters", "gradients", "master parameters", "optimizer states")
        assert sum(plan.prediction.of(name) for name in names) / GIB == pytest.approx(states, rel=0.01)
        fits(result)
    on_one = found("vit-large/16", "8xH100", global_batch=64)
    assert on_one.plan.zero.offload_optimizer.device == "cpu"
    reasons = {verdict.strategy: verdict.reason for verdict in on_one.strategies}
    assert "on the device, 73.28 GiB usable" in reasons["ZeRO-3, no offload"]
    fits(on_one)


@pytest.mark.parametrize(("model", "cluster"), [("gpt-base/1024", "8xH100"), ("gpt-large/1024", "2x8xH200")])
def test_language_models_of_1024_tokens(model: str, cluster: str) -> None:
    # gpt-base/1024: 21.9 G parameters of 16 bytes on 8 ranks are 40.8 GiB per rank. gpt-large/1024: 77.7 G on 16
    # ranks of 140 GiB are 72.4 GiB.
    result = found(model, cluster, global_batch=128)
    assert not result.plan.zero.offloads
    share = 16 * count_parameters(preset(model)).total / result.plan.cluster.world_size
    names = ("parameters", "gradients", "master parameters", "optimizer states")
    assert sum(result.plan.prediction.of(name) for name in names) == pytest.approx(share, rel=0.01)
    fits(result)


def test_vit_base_16_on_four_rtx_4090_swaps_to_nvme() -> None:
    # On the device stay 2 bytes per parameter of a rank's quarter: 7.3 GiB. States of 12 bytes per parameter, 174 GiB,
    # are files: with 2 bytes of accumulator the host would hold over 14 x 15.6 G = 204 GiB of its 256 GiB.
    result = found("vit-base/16", "4xRTX4090", global_batch=64, nvme_path="/nvme")
    plan = result.plan
    assert "nvme" in (plan.zero.offload_optimizer.device, plan.zero.offload_param.device)
    assert plan.prediction.highest(Tier.NVME) > 12 * 15.6e9 / 4
    assert plan.time is not None
    assert plan.time.bound == "NVMe"
    fits(result)


def test_vit_large_16_on_one_4090_with_a_small_host_does_not_fit_and_gets_advice() -> None:
    cluster = load_cluster("1xRTX4090").model_copy(update={"host_memory_bytes": 64 * GIB, "nvme_bytes": None})
    with pytest.raises(NoPlanFits) as error:
        search_plan(preset("vit-large/16"), cluster, BF16)
    assert error.value.exit_code == 3
    text = {advice.kind: advice.text for advice in error.value.advice}
    # 55.5 G parameters of 16 bytes in 24 GiB per node need over 34 nodes without offload; with it, fewer.
    assert text["nodes"].endswith("nodes of 1 ranks")
    assert int(text["nodes"].split()[0]) > 4
    assert "rather than 224 x 224" in text["input"]


def test_advised_changes_make_a_plan_fit() -> None:
    cluster = load_cluster("1xH200")
    with pytest.raises(NoPlanFits) as error:
        search_plan(preset("vit-base/16"), cluster, BF16)
    hybrids = error.value.hybrids
    assert hybrids
    assert [row.full_layers for row in hybrids] == sorted((row.full_layers for row in hybrids), reverse=True)
    best = override(preset("vit-base/16"), **hybrids[0].changes)
    assert best.layer_operators.count("translution") == hybrids[0].full_layers
    assert count_parameters(best).total == hybrids[0].parameters
    search_plan(best, cluster, BF16)
    one_more = hybrids[0].changes | {"relative_layers": f"first:{hybrids[0].full_layers + 1}"}
    with pytest.raises(NoPlanFits):
        search_plan(override(preset("vit-base/16"), **one_more), cluster, BF16, SearchConstraints(micro_batch=1))
    for advice in error.value.advice:
        if advice.changes:
            search_plan(
                override(preset("vit-base/16"), **advice.changes), cluster, BF16, SearchConstraints(micro_batch=1)
            )


def test_the_search_finds_a_plan_for_every_advised_hybrid() -> None:
    """Tiles may have the same closed-form bound, above the usable memory, and yet fit when they are replayed."""
    cluster, constraints = (
        load_cluster("1x1xRTX4090"),
        SearchConstraints(headroom=0.9, stage=3, offload="none", global_batch=1),
    )
    training = TrainingSpec(precision="bf16", data="synthetic")
    model = override(preset("gpt-mini/256"), depth=4)
    with pytest.raises(NoPlanFits) as error:
        search_plan(model, cluster, training, constraints)
    assert sorted(row.c1 or 0 for row in error.value.hybrids) == [0, 4, 8, 16, 32]
    for row in error.value.hybrids:
        assert search_plan(override(model, **row.changes), cluster, training, constraints).plan


def test_every_strategy_and_every_knob_has_a_reason() -> None:
    result = found("vit-base/16", "2x8xH100", global_batch=256)
    assert sum(verdict.chosen for verdict in result.strategies) == 1
    assert {verdict.strategy for verdict in result.strategies} >= {"ZeRO-0, no offload", "ZeRO-3, all on NVMe"}
    assert all(verdict.reason for verdict in result.strategies)
    zero_overrides = {knob.knob for knob in result.knobs}
    assert {"nodes", "stage and offload", "checkpointing", "micro-batch", "relations per tile"} <= zero_overrides
    assert all(knob.reason and knob.value for knob in result.knobs)
    points = result.pareto
    assert points[0].step_s == min(point.step_s for point in points)
    for one in points:
        assert not any(
            other.step_s < one.step_s and other.device_bytes < one.device_bytes and other.nodes <= one.nodes
            for other in points
        )


@pytest.mark.slow
def test_each_objective_is_minimal() -> None:
    plans = {goal: found("vit-base/16", "2x8xH100", global_batch=256, minimize=goal).plan for goal in
             ("time", "nodes", "cost", "memory")}  # fmt: skip
    times = {goal: plan.time for goal, plan in plans.items()}
    seconds = {goal: time.likely_s for goal, time in times.items() if time is not None}
    assert seconds["time"] == min(seconds.values())
    assert (plans["time"].cluster.nodes, plans["nodes"].cluster.nodes) == (2, 1)
    cost = {goal: seconds[goal] * plan.cluster.nodes for goal, plan in plans.items()}
    assert cost["cost"] <= cost["time"]
    assert plans["memory"].prediction.peak_bytes == min(plan.prediction.peak_bytes for plan in plans.values())


def test_fixed_choices_are_not_changed() -> None:
    constraints = {"stage": 2, "micro_batch": 2, "accumulation": 4, "checkpointing": "block", "all_nodes": True}
    plan = found("vit-small/32", "2x8xH100", **constraints).plan
    assert (plan.zero.stage, plan.training.micro_batch, plan.training.gradient_accumulation_steps) == (2, 2, 4)
    assert plan.model.checkpointing == "block"
    assert plan.cluster.nodes == 2
    tile = found("vit-small/32", "8xH100", stage=3, tile_relations=7, zero_overrides={"sub_group_elements": 12345}).plan
    assert (tile.tile_relations, tile.zero.sub_group_elements) == (7, 12345)


def test_a_batch_that_is_no_multiple_of_the_ranks_is_an_error() -> None:
    with pytest.raises(InputError, match="global_batch: 100 is not allowed: must be a multiple of the 8 ranks"):
        found("vit-tiny/56", "8xH100", global_batch=100)


def test_nvme_offload_needs_tensors_that_deepspeed_swaps() -> None:
    with pytest.raises(NoPlanFits, match="does not fit"):
        found("vit-tiny/56", "8x8xH100", offload="nvme", nvme_path="/nvme")
    plan = found("vit-base/16", "8xH100", offload="nvme", nvme_path="/nvme", micro_batch=1).plan
    largest = plan.zero.offload_param.buffer_elements
    assert largest * plan.training.dtype_bytes >= 2**20


@pytest.mark.slow
def test_five_thousand_candidates_are_considered() -> None:
    """The search is fast without dropping candidates; benchmarks/planner.py measures its time."""
    searcher = Searcher(preset("vit-base/16"), load_cluster("2x8xH100"), BF16, SearchConstraints(global_batch=1024))
    assert searcher.considered >= 5000


CLUSTERS = ("1xH200", "8xA100-80", "2x8xH100", "4xRTX4090", "cpu:1")
MODELS = ("vit-tiny/56", "vit-small/32", "gpt-mini/160", "vit-base/32")
STRATEGIES = [(0, "none"), (1, "none"), (2, "none"), (2, "cpu-optimizer")]
STRATEGIES += [(3, offload) for offload in ("none", "cpu-optimizer", "cpu", "nvme-optimizer", "nvme")]

LLAMA = {"norm": "rms", "ffn": "swiglu", "bias": False}


@examples(15)
@given(
    st.sampled_from(MODELS),
    st.sampled_from(CLUSTERS),
    st.sampled_from(STRATEGIES),
    st.sampled_from(["none", "block", "offload"]),
    st.sampled_from(["translution", "alpha", "attention"]),
    st.integers(1, 12),
    st.sampled_from([1, 3]),
    st.sampled_from(["fp32", "bf16", "fp16", "autocast"]),
    st.booleans(),
)
@example("vit-tiny/56", "1xH200", (0, "none"), "none", "translution", 2, 1, "bf16", False)
@example("vit-base/32", "8xA100-80", (3, "none"), "offload", "translution", 8, 1, "fp16", False)
@example("vit-small/32", "4xRTX4090", (3, "nvme"), "none", "alpha", 33, 1, "fp16", False)
def test_closed_forms_are_never_below_the_estimate(
    model: str,
    cluster: str,
    strategy: Any,
    mode: str,
    operator: str,
    batch: int,
    times: int,
    precision: Any,
    llama: bool,
) -> None:
    autocast, language = precision == "autocast", model.startswith("gpt")
    more = (LLAMA if llama else {}) | ({"tied_embeddings": True} if llama and language else {})
    spec = override(
        preset(model), checkpointing="block" if autocast and mode == "offload" else mode, operator=operator, **more
    )
    where, (stage, offload) = load_cluster(cluster), strategy
    training = TrainingSpec(
        precision="fp32" if autocast else precision,
        torch_autocast="bf16" if autocast else None,
        micro_batch=batch,
        gradient_accumulation_steps=times,
        data="synthetic",
        adam="8bit" if offload == "none" and batch % 2 else "auto",
        loss="chunked" if llama and language else "whole",
    )
    tile = choose_tile(spec, where.world_size)
    path = "/nvme" if "nvme" in offload else None
    zero = choose_zero(spec, tile, stage, where.world_size, offload=offload, nvme_path=path)
    if where.nodes > 1 and zero.stage == 3 and not zero.offloads and llama:
        zero = zero.model_copy(update={"hpz_ranks": where.ranks_per_node, "quantized_weights": autocast})
    run = RunConfig(spec, where, training, zero, tile)
    bounds, memory = bound_memory(run), estimate_memory(run)
    overhead = where.device_overhead()
    runtime = {item.name.replace("_", " ") for item in overhead.breakdown} if overhead else set()
    sizes = {"device": bounds.device, "host": bounds.host, "pinned": bounds.pinned, "nvme": bounds.nvme}
    for tier, size in sizes.items():
        if where.device == "cpu" and tier == "device":
            tier = "host"
        elif where.device == "cpu" and tier == "host":
            continue
        peaks = [peak for peak in memory.peaks if peak.tier == tier]
        tensors = [
            sum(item.bytes for item in peak.breakdown if item.name not in {*runtime, "fragmentation", "bookkeeping"})
            for peak in peaks
        ]
        assert size >= max(tensors, default=0), tier


@examples(10)
@given(st.sampled_from(MODELS), st.sampled_from(["A100-80", "H100"]), st.integers(1, 3), st.integers(1, 8))
def test_device_memory_falls_with_ranks_and_offload_and_grows_with_the_batch(
    model: str, gpu: str, power: int, batch: int
) -> None:
    spec = preset(model)

    def device(ranks: int, batch: int, offload: str = "none") -> int:
        cluster = load_cluster(f"{ranks}x{gpu}")
        training = TrainingSpec(precision="bf16", micro_batch=batch, data="synthetic")
        # The same tiles for all: to ZeRO, another tiling is another model.
        tile = choose_tile(spec, 8)
        zero = choose_zero(spec, tile, 3, ranks, offload=offload)
        memory = estimate_memory(RunConfig(spec, cluster, training, zero, tile))
        overhead = cluster.device_overhead()
        assert overhead is not None
        names = {item.name.replace("_", " ") for item in overhead.breakdown} | {"fragmentation"}
        return max(
            sum(item.bytes for item in peak.breakdown if item.name not in names)
            for peak in memory.peaks if peak.tier == "device"
        )  # fmt: skip

    ranks = 2**power
    assert device(2 * ranks if power < 3 else ranks, batch) <= device(ranks, batch)
    assert device(ranks, batch) <= device(ranks, batch + 1)
    assert device(ranks, batch, "cpu-optimizer") <= device(ranks, batch)
    assert device(ranks, batch, "cpu") <= device(ranks, batch, "cpu-optimizer")


@examples(6)
@given(st.sampled_from(MODELS), st.sampled_from(CLUSTERS), st.sampled_from([None, 0, 1, 2, 3]), st.integers(1, 4))
def test_a_plan_that_fits_is_under_every_capacity(model: str, cluster: str, stage: Any, batch: int) -> None:
    where = load_cluster(cluster)
    try:
        result = search_plan(
            preset(model), where, BF16, SearchConstraints(stage=stage, global_batch=batch * where.world_size)
        )
    except NoPlanFits:
        return
    fits(result)
    assert result.plan.training.global_batch(result.plan.cluster.world_size) == batch * where.world_size


@pytest.mark.slow
def test_the_command_line_prints_advice_and_writes_a_spec_for_each_hybrid(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "plan"
    arguments = ["plan", "vit-base/16", "--cluster", "1xH200", "--precision", "bf16", "--data", "synthetic"]
    assert run([*arguments, "--out", str(out)]) == 3
    captured = capsys.readouterr()
    assert captured.err.startswith("translution: error: vit-base/16 does not fit on 1x1xH200")
    assert captured.err.count("\n") == 1
    assert "Any one of these changes makes a plan fit" in captured.out
    assert not out.exists()
    specs = sorted((tmp_path / "plan-hybrids").glob("*.yaml"))
    assert specs
    for path in specs:
        assert "translution" in load_model(str(path)).layer_operators
        assert run([*["plan", str(path)], *arguments[2:], "--out", str(tmp_path / path.stem)]) == 0


def test_the_json_of_a_plan_is_complete(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cluster = tmp_path / "priced.yaml"
    cluster.write_text("base: 8xH100\nprice_per_gpu_hour: 2.5\n")
    arguments = ["plan", "vit-base/32", "--cluster", str(cluster), "--precision", "bf16", "--data", "synthetic"]
    arguments += ["--samples", "1000", "--epochs", "2", "--global-batch", "64", "--out", str(tmp_path / "plan")]
    assert run([*arguments, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["plan"]["training"]["steps"] == 32  # 2000 samples, 64 per step.
    assert document["run"]["price"] == pytest.approx(2.5 * document["run"]["gpu_hours"])
    assert document["considered"] > 100
    assert document["plan"]["time"]["mfu"] < 1


def test_the_search_returns_a_plan_that_fits() -> None:
    plan = search_plan(preset("vit-tiny/56"), load_cluster("1xH100"), BF16).plan
    assert plan.prediction.peak_bytes < plan.cluster.device_memory_bytes


def test_a_cluster_without_rates_is_an_error() -> None:
    bare = ClusterSpec(ranks_per_node=8, device_memory_bytes=80 * GIB)
    with pytest.raises(InputError, match="bf16_flops_per_s: is required to predict times"):
        search_plan(preset("vit-tiny/56"), bare, BF16)


def test_a_strategy_without_candidates_gives_its_reason() -> None:
    spec = override(preset("vit-tiny/56"), dim=64, heads=2, depth=1)
    with pytest.raises(NoPlanFits, match="all on NVMe: a rank's partitions are below 1 MiB"):
        search_plan(
            spec,
            load_cluster("8xH100"),
            TrainingSpec(precision="bf16", data="synthetic"),
            SearchConstraints(offload="nvme", nvme_path="/nvme"),
        )
