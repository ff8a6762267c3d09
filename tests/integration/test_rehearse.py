"""Rehearsals of one rank of a planned world, and the allocations of fake compute."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.runs import run_plan

from translution.cli.main import run as run_cli
from translution.distributed.profiling.allocation_tracer import SavedTensorCounter, trace_allocations
from translution.distributed.runs.measurement import MemoryMeasurement, read_memory
from translution.distributed.runs.mode import RunMode
from translution.distributed.system.compiled_ops import prepare_ops
from translution.distributed.system.environment import launch_environment
from translution.distributed.verification.extrapolate import (
    INIT_ENGINE,
    INIT_MODEL,
    extrapolate,
    join_init,
    largest_sub_group,
)
from translution.distributed.verification.fake_compute import FakeCompute
from translution.distributed.verification.fake_process_group import replaced
from translution.distributed.verification.rehearsal import predict_rehearsal, read_rehearsal, rehearse, with_layers
from translution.models import build
from translution.models.ops import batched
from translution.models.ops.grouped_mm import GroupedProducts
from translution.planner.common.machine import usable_cores
from translution.planner.common.phases import TRAINING_PHASES, Phase
from translution.planner.common.units import GIB
from translution.planner.config.loading import preset
from translution.planner.config.model import parse_model_spec
from translution.planner.config.training import TrainingSpec
from translution.planner.hardware.cluster import ClusterSpec, load_cluster, local_cpu_cluster
from translution.planner.plans.build import make_plan
from translution.planner.plans.folder import write_plan_folder
from translution.planner.plans.plan import Plan

TINY = {"family": "vit", "image": 16, "patch": 4, "channels": 1, "classes": 10, "dim": 64, "depth": 4, "heads": 2}
STATES = ("parameters", "gradients", "master parameters", "optimizer states", "reduce bucket", "persistent parameters")


def eight_ranks(device: Any = "cpu", memory: int = 8 * GIB) -> ClusterSpec:
    return ClusterSpec(name="eight", device=device, ranks_per_node=8, device_memory_bytes=memory)


def write_plan(
    folder: Path,
    cluster: ClusterSpec,
    model: dict[str, Any] | None = None,
    *,
    offload: str = "none",
    relation_parallel: int = 1,
    **training: Any,
) -> Plan:
    values = {"micro_batch": 4, "steps": 3, "data": "synthetic"} | training
    plan = make_plan(
        parse_model_spec(TINY | (model or {})),
        cluster,
        TrainingSpec(**values),
        offload=offload,
        nvme_path="/nowhere/nvme" if offload.startswith("nvme") else None,
        relation_parallel=relation_parallel,
    )
    write_plan_folder(plan, folder)
    return plan


def test_a_rank_of_a_group_that_shares_out_the_relations_holds_what_is_predicted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rank 9 of 64 is at place 1 of the second of eight groups."""
    cluster = eight_ranks("cuda").model_copy(update={"nodes": 8})
    folder = tmp_path / "plan"
    write_plan(folder, cluster, {"depth": 2}, precision="bf16", relation_parallel=8)
    assert run_cli(["rehearse", str(folder), "--rank", "9", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    rows = {row["what"]: (row["predicted_bytes"], row["measured_bytes"]) for row in document["memory"]}
    for name in STATES:
        predicted, measured = rows[name]
        assert measured == pytest.approx(predicted, rel=1e-3), name
    for phase in ("forward", "backward"):
        predicted, measured = rows[f"peak of {phase}"]
        assert measured <= predicted < 1.15 * measured, phase


def test_a_rank_of_a_larger_world_holds_what_is_predicted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 3 of 8 GPU ranks, with 1 and 2 of 4 layers; one core is enough."""
    monkeypatch.setenv("PYTHONPROFILEIMPORTTIME", "1")  # The rank tells in its log what it imports.
    folder = tmp_path / "plan"
    plan = write_plan(folder, eight_ranks("cuda"), precision="bf16")
    assert run_cli(["rehearse", str(folder), "--rank", "3", "--layers", "2", "--json"]) == 0
    printed = capsys.readouterr()
    document = json.loads(printed.out)
    assert "every value was meaningless" in document["meaning"]
    assert (document["rank"], document["ranks"], document["layers"], document["depth"]) == (3, 8, 2, 4)
    rows = {row["what"]: (row["predicted_bytes"], row["measured_bytes"]) for row in document["memory"]}
    for name in STATES:
        predicted, measured = rows[name]
        # Persistent parameters are padded to a multiple of the ranks; Adam's step counters are not predicted.
        padding = {"persistent parameters": 2048, "optimizer states": 2048}.get(name, 0)
        assert 0 <= measured - predicted <= padding, name
        assert predicted == plan.prediction.of(name), name
    for phase in (Phase.INIT, Phase.FIRST_STEP, Phase.FORWARD, Phase.BACKWARD, Phase.STEP):
        predicted, measured = rows[f"peak of {phase}"]
        assert 0.99 * measured <= predicted <= 1.15 * measured, phase
    assert document["planned_bytes"]["device"] == plan.prediction.peak_bytes
    for line in ("with 2 layers", "with 1 layer\n", "init: engine", "step 2 of 2: backward"):
        assert line in printed.err
    assert run_cli(["verify", str(folder)]) == 0
    shown = capsys.readouterr().out
    assert "REHEARSAL: every value was meaningless; only memory was real." in shown
    assert "extrapolated from 2 layers and 1" in shown
    log = "".join(path.read_text() for path in (folder / "runs").rglob("*.log"))
    assert "torch.optim" in log
    assert "torch._dynamo" not in log


@pytest.mark.skipif(usable_cores() < 2, reason="needs two cores")
def test_a_rehearsed_rank_has_the_memory_of_a_real_one(tmp_path: Path) -> None:
    """Rank 0 of 2 alone, against the same rank in a real run of two ranks with gloo."""
    folder = tmp_path / "plan"
    cluster = local_cpu_cluster(2)
    write_plan(folder, cluster, {"depth": 2}, data="digits")
    prepare_ops(["ShareMemCommBuilder"], launch_environment(cluster), tmp_path / "log")
    real = read_memory(run_plan(folder, 2, RunMode.MEASURE), 0)
    found, run = rehearse(folder, 0)
    alone = found.measurement
    assert real is not None
    assert {name: alone.entries_bytes[name] for name in STATES} == {name: real.entries_bytes[name] for name in STATES}
    assert alone.entries_bytes["micro-batches"] == real.entries_bytes["micro-batches"]
    assert alone.saved_bytes == real.saved_bytes
    # The order of the samples takes 8 bytes each, and there are more synthetic samples.
    assert abs(alone.resident_bytes - real.resident_bytes) <= 8 * 4096
    for phase in TRAINING_PHASES:
        temporaries, real_temporaries = (part.phase_peak_bytes[phase] - part.resident_bytes for part in (alone, real))
        # gloo gathers and reduces in its own tensors, and its thread frees them later.
        assert 0.6 * real_temporaries <= temporaries <= real_temporaries + 64, phase
    assert read_rehearsal(run) == found
    assert set(found.seconds[2]) == {
        INIT_MODEL,
        INIT_ENGINE,
        Phase.FORWARD,
        Phase.BACKWARD,
        Phase.FIRST_STEP,
        Phase.STEP,
        "all",
    }


def measurement_of(plan: Plan) -> MemoryMeasurement:
    """A measurement equal to the predicted memory."""
    predicted = predict_rehearsal(plan)
    init = predicted.bytes_of(Phase.INIT)
    peaks = {
        phase: predicted.bytes_of(phase) for phase in (Phase.FORWARD, Phase.BACKWARD, Phase.FIRST_STEP, Phase.STEP)
    }
    return MemoryMeasurement(
        rank=0,
        device="cpu",
        step=1,
        entries_bytes={name: predicted.of(name) for name in STATES},
        resident_bytes=predicted.bytes_of(Phase.BETWEEN),
        phase_peak_bytes=peaks | {INIT_MODEL: init // 2, INIT_ENGINE: init},
        peak_bytes=max(peaks.values()),
        process_peak_bytes=0,
        saved_bytes=predicted.saved_bytes,
    )


def large_plan() -> Plan:
    training = TrainingSpec(precision="bf16", micro_batch=1, data="synthetic")
    return make_plan(preset("vit-large/16"), load_cluster("64x8xH100"), training)


def test_layers_and_sub_groups_are_extrapolated() -> None:
    """From 3 layers to 24; the largest sub-group of 3 layers is smaller than that of 24."""
    plan = large_plan()
    parts = {count: with_layers(plan, count) for count in (2, 3)}
    groups = {count: largest_sub_group(part) for count, part in (parts | {24: plan}).items()}
    assert groups[2] < groups[3] < groups[24]
    found = extrapolate({count: measurement_of(part) for count, part in parts.items()}, groups, 24)
    expected = measurement_of(plan)
    assert found.entries_bytes == expected.entries_bytes
    assert found.saved_bytes == expected.saved_bytes
    assert found.resident_bytes == expected.resident_bytes
    for phase in (Phase.FORWARD, Phase.BACKWARD, Phase.FIRST_STEP, Phase.STEP):
        # The predicted upper bounds of bookkeeping do not grow with the layers.
        assert found.phase_peak_bytes[phase] == pytest.approx(expected.phase_peak_bytes[phase], rel=2e-3), phase
    assert found.peak_bytes == max(found.phase_peak_bytes[phase] for phase in TRAINING_PHASES)


def test_init_is_the_higher_of_its_parts() -> None:
    measured = measurement_of(large_plan())
    joined = join_init(measured).phase_peak_bytes
    assert joined[Phase.INIT] == measured.phase_peak_bytes[INIT_ENGINE]
    assert set(joined) == {Phase.INIT, Phase.FORWARD, Phase.BACKWARD, Phase.FIRST_STEP, Phase.STEP}


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Run torch with one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("way", ["grouped", "batched", "grouped products"])
@pytest.mark.parametrize("model", [{}, {"operator": "alpha"}, {"checkpointing": "block", "dropout": 0.1}], ids=str)
def test_fake_compute_allocates_what_real_compute_does(way: str, model: dict[str, Any]) -> None:
    found = []
    for fake in (False, True):
        with contextlib.ExitStack() as stack:
            if way == "grouped products":
                stack.enter_context(replaced(batched, "choose_products", lambda *_: GroupedProducts()))
            if fake:
                stack.enter_context(FakeCompute())
            implementation = "grouped" if way == "grouped" else "batched"
            spec = parse_model_spec(TINY | {"dim": 32, "depth": 2} | model)
            network = build(spec, tile_relations=13, implementation=implementation)
            images, targets = torch.randn(3, 1, 16, 16), torch.zeros(3, dtype=torch.int64)

            def step(network: Any = network, images: Any = images, targets: Any = targets) -> None:
                torch.nn.functional.cross_entropy(network(images), targets).backward()

            step()  # The first step makes the index lists.
            network.zero_grad()
            saved = SavedTensorCounter(network)
            with saved.counting():
                step()
            network.zero_grad()
            before, peak = trace_allocations(step)
            found.append((peak - before, saved.total_bytes))
            grads = {name: parameter.grad for name, parameter in network.named_parameters()}
        assert all(grad is not None and grad.isfinite().all() for grad in grads.values())
        moved = [name for name, grad in grads.items() if grad is not None and grad.any()]
        # Only the last bias has a gradient that passes through no product.
        assert moved == ["head.bias"] if fake else len(moved) > len(grads) // 2
    assert found[0] == found[1]


def bad_plans(folder: Path) -> None:
    write_plan(folder / "tiny", eight_ranks())
    write_plan(folder / "hybrid", eight_ranks(), {"relative_layers": "first:2"})
    write_plan(folder / "nvme", eight_ranks(), offload="nvme")
    huge = ClusterSpec(device="cuda", ranks_per_node=1, device_memory_bytes=2**50)
    plan = make_plan(preset("vit-large/16"), huge, TrainingSpec(data="synthetic", micro_batch=1))
    write_plan_folder(plan, folder / "huge")
    lion = TrainingSpec(data="synthetic", optimizer="lion")
    write_plan_folder(make_plan(parse_model_spec(TINY), eight_ranks("cuda"), lion), folder / "lion")


BAD = [
    ("rank: 8 is not allowed: must be from 0 to 7", ["tiny", "--rank", "8"]),
    ("rank: -1 is not allowed", ["tiny", "--rank", "-1"]),
    ("layers: 5 is not allowed: must be from 2 to 4", ["tiny", "--layers", "5"]),
    ("layers: 1 is not allowed", ["tiny", "--layers", "1"]),
    ("the layers of custom differ", ["hybrid", "--layers", "2"]),
    ("is not a plan folder", ["absent"]),
    ("exists already", ["tiny", "--run", "hybrid"]),
    ("nvme_path: '/nowhere/nvme' is not allowed: must be a folder of this machine", ["nvme"]),
    ("puts nothing on NVMe", ["tiny", "--nvme-path", "/tmp"]),
    ("of memory, this machine has", ["huge"]),
    ("optimizer: 'lion' is not allowed", ["lion"]),
]


@pytest.fixture(scope="module")
def plans(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plans")
    bad_plans(folder)
    return folder


@pytest.mark.parametrize(("message", "arguments"), BAD, ids=[entry[0][:40] for entry in BAD])
def test_bad_input_is_one_line_and_writes_nothing(
    message: str, arguments: list[str], plans: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(plans.rglob("*"))
    named = [str(plans / word) if word in ("hybrid", arguments[0]) else word for word in arguments]
    assert run_cli(["rehearse", *named]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert message in printed.err
    assert sorted(plans.rglob("*")) == before
