"""A run resumed on other ranks, another stage and other tiers computes what the uninterrupted run does."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.chance import examples
from helpers.checkpoint_files import KINDS, saved_of, write_checkpoint
from helpers.runs import TINY, run_plan, run_ranks_of, write_plan
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from translution.cli.main import run as run_cli
from translution.distributed.checkpoint.reader import MASTER_COPY, CheckpointReader, VectorPart, overlapping_parts
from translution.distributed.checkpoint.resume import check_same_training, describe_resharding, layout_changes
from translution.distributed.checkpoint.shard_layout import (
    Fragment,
    sub_group_fragments,
    successive_fragments,
    untiled_positions,
)
from translution.distributed.data.loaders import load_samples
from translution.distributed.runs.folder import CHECKPOINT, METRICS, memory_path
from translution.distributed.system.compiled_ops import prepare_ops
from translution.distributed.system.environment import launch_environment
from translution.models import build, load_network
from translution.planner.common.errors import InputError
from translution.planner.common.machine import usable_cores
from translution.planner.config.model import parse_model_spec
from translution.planner.config.parallel import ParallelSpec
from translution.planner.config.training import TrainingSpec
from translution.planner.hardware.cluster import local_cpu_cluster
from translution.planner.plans.build import make_plan
from translution.planner.plans.plan import PLAN_FILE, Plan, load_plan

two_cores = pytest.mark.skipif(usable_cores() < 2, reason="needs two cores")
WIDE = TINY | {"dim": 160, "depth": 1}
"""On two ranks, only the tables of this model are large enough for NVMe."""
numels = st.lists(st.integers(1, 12), min_size=1, max_size=5)


def labels(numel_of: dict[str, int]) -> dict[str, list[Any]]:
    return {name: [(name, index) for index in range(numel)] for name, numel in numel_of.items()}


def read_back(fragments: Sequence[Fragment], flat: list[Any]) -> list[Any]:
    """Parameter and index of every element of a vector according to its fragments; None for padding."""
    found: list[Any] = [None] * len(flat)
    for part in fragments:
        for index in range(part.numel):
            assert found[part.offset + index] is None
            found[part.offset + index] = (part.name, part.start + index)
    return found


@examples(30)
@given(numels, st.integers(1, 5))
def test_fragments_of_sub_groups_name_every_element_of_every_rank(counts: list[int], ranks: int) -> None:
    numel_of = {f"p{number}": numel for number, numel in enumerate(counts)}
    flats: list[list[Any]] = [[] for _ in range(ranks)]
    for values in labels(numel_of).values():
        while len(values) % ranks:
            values.append(None)
        for rank in range(ranks):
            flats[rank] += values[rank * len(values) // ranks : (rank + 1) * len(values) // ranks]
    for rank, flat in enumerate(flats):
        assert read_back(sub_group_fragments(numel_of, ranks, rank), flat) == flat


@examples(30)
@given(numels, st.integers(1, 5))
def test_fragments_of_one_vector_are_consecutive_from_rank_to_rank(counts: list[int], ranks: int) -> None:
    numel_of = {f"p{number}": numel for number, numel in enumerate(counts)}
    vector = [label for values in labels(numel_of).values() for label in values]
    while len(vector) % ranks:
        vector.append(None)
    share = len(vector) // ranks
    flats = [vector[rank * share : (rank + 1) * share] for rank in range(ranks)]
    spans = [
        {
            name: (flat.index(held[0]), len(held))
            for name in numel_of
            if (held := [label for label in flat if label and label[0] == name])
        }
        for flat in flats
    ]
    for flat, fragments in zip(flats, successive_fragments(spans), strict=True):
        assert read_back(fragments, flat) == flat


@examples(30)
@given(st.lists(st.integers(1, 6), min_size=1, max_size=6), st.data())
def test_overlapping_parts_are_those_that_hold_an_element_of_the_range(counts: list[int], data: st.DataObject) -> None:
    parts = [VectorPart(sum(counts[:number]), numel, number, 0, 0) for number, numel in enumerate(counts)]
    start = data.draw(st.integers(0, sum(counts) - 1))
    stop = data.draw(st.integers(start + 1, sum(counts)))
    expected = [part for part in parts if set(range(part.start, part.start + part.numel)) & set(range(start, stop))]
    assert list(overlapping_parts(parts, start, stop)) == expected


@pytest.mark.parametrize("operator", ["translution", "absolute", "bias", "shaw", "alpha"])
def test_tiles_are_consecutive_parts_of_their_table(operator: str) -> None:
    spec = parse_model_spec(TINY | {"operator": operator})
    tiled, untiled = build(spec, tile_relations=5), build(spec)
    sizes = {name: value.numel() for name, value in tiled.named_parameters()}
    positions = untiled_positions(sizes)
    elements: dict[str, set[int]] = {}
    for name, position in positions.items():
        own = set(range(position.start, position.start + sizes[name]))
        assert not own & elements.setdefault(position.name, set())
        elements[position.name] |= own
    assert elements == {name: set(range(value.numel())) for name, value in untiled.named_parameters()}
    for name, module in tiled.named_modules():
        if hasattr(module, "first") and hasattr(module, "tile"):
            for role, value in module.named_parameters():
                assert positions[f"{name}.{role}"].start == module.first * value[0].numel()


def random_tensors(spec: dict[str, Any], tile: int) -> dict[str, dict[str, Tensor]]:
    """Random values of every kind for every parameter of a model."""
    network = build(parse_model_spec(spec), tile_relations=tile)
    return {kind: {name: torch.randn(p.shape) for name, p in network.named_parameters()} for kind in KINDS}


@pytest.mark.parametrize(("ranks", "swapped"), [(1, False), (3, False), (3, True)])
def test_any_range_of_any_parameter_is_read(tmp_path: Path, ranks: int, swapped: bool) -> None:
    tensors = random_tensors(TINY, 20)
    names = list(tensors["master"])
    groups = [names[:5], names[5:7], names[7:]]
    folder = write_plan(tmp_path / "plan", 2, tile=20)
    reader = CheckpointReader(saved_of(write_checkpoint(folder, tensors, groups, ranks, swapped=swapped)))
    assert (reader.step, reader.kinds) == (7, ["first", "second"])
    assert reader.counters == {"global_steps": 7, "global_samples": 112, "skipped_steps": 0}
    tiles = "blocks.1.operator.tables.logit_tiles.{}.key"
    for kind, name in zip((MASTER_COPY, "first", "second"), KINDS, strict=True):
        full = torch.cat([tensors[name][tiles.format(number)].flatten() for number in range(3)])
        for start, stop in ((0, len(full)), (5119, 5122), (0, 1), (len(full) - 1, len(full)), (3000, 12000)):
            out = torch.empty(stop - start)
            reader.read(tiles.format(0), kind, start, out)
            assert torch.equal(out, full[start:stop])
        bias = tensors[name]["head.bias"]
        reader.read("head.bias", kind, 0, out := torch.empty(len(bias)))
        assert torch.equal(out, bias)


def test_a_damaged_or_malicious_checkpoint_file_is_refused(tmp_path: Path) -> None:
    tensors = random_tensors(TINY, 20)
    folder = write_plan(tmp_path / "plan", 2, tile=20)
    run = write_checkpoint(folder, tensors, [list(tensors["master"])], 2)
    saved = saved_of(run)
    path = saved.folder / saved.tag / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match=r"optim_states\.pt: cannot be read: "):
        CheckpointReader(saved)
    marker = tmp_path / "marker"
    torch.save({"optimizer_state_dict": Malicious(marker)}, path)
    with pytest.raises(InputError, match=r"posix.system is not allowed in a checkpoint"):
        CheckpointReader(saved)
    assert not marker.exists()


class Malicious:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)


def plan_of(ranks: int, *, tile: int = 13, stage: Any = 3, offload: str = "none", **training: Any) -> Plan:
    values = {"micro_batch": 8, "steps": 4} | training
    model = parse_model_spec(TINY)
    return make_plan(
        model, local_cpu_cluster(ranks), TrainingSpec(**values), stage=stage, tile_relations=tile, offload=offload
    )


def test_a_resumed_run_may_change_its_layout_but_not_its_training(tmp_path: Path) -> None:
    before = plan_of(2)
    for same in (
        before,
        plan_of(2, steps=9, checkpoint_steps=1),
        plan_of(2, micro_batch=4, gradient_accumulation_steps=2),
    ):
        check_same_training(same, before)
        assert layout_changes(same, before) == []
    elsewhere = {
        "from 2 ranks to 1": plan_of(1, micro_batch=16),
        "from tile_relations 13 to 26": plan_of(2, tile=26),
        "from parallel.relation 1 to 2": before.model_copy(update={"parallel": ParallelSpec(relation=2)}),
        "from zero.stage 3 to 2": plan_of(2, stage=2),
        "from zero.offload_optimizer.device none to cpu": plan_of(2, offload="cpu-optimizer"),
    }
    for text, plan in elsewhere.items():
        check_same_training(plan, before)
        assert text in layout_changes(plan, before)
    refused = {
        r"global batch: 8 \(micro-batch 8 x accumulation 1 x ranks 1\) is not allowed: must be 16, ": plan_of(1),
        "training.optimizer: 'sgd' is not allowed: must be 'adamw', as in the run to resume": plan_of(
            2, optimizer="sgd"
        ),
        "training.precision: 'bf16' is not allowed": plan_of(2, precision="bf16"),
        "training.seed: 5 is not allowed": plan_of(2, seed=5),
    }
    for text, plan in refused.items():
        with pytest.raises(InputError, match=text):
            check_same_training(plan, before)
    folder = write_plan(tmp_path / "plan", 2, tile=20)
    tensors = random_tensors(TINY, 20)
    saved = saved_of(write_checkpoint(folder, tensors, [list(tensors["master"])], 2))
    assert describe_resharding(load_plan(folder), saved) == ""
    assert describe_resharding(plan_of(1, micro_batch=16, tile=20), saved).startswith(
        "resharding step 7 from 2 ranks to 1"
    )
    # Checkpoints of earlier versions contain no plan.
    (saved.folder / saved.tag / PLAN_FILE).unlink()
    assert saved.plan() == load_plan(folder)


def test_engines_of_every_layout_hold_what_was_saved(tmp_path: Path, root: Path) -> None:
    """DeepSpeed's own getters return the saved values bit for bit after loading, and nearly the same after a step."""
    chains = ["adamw-short", "sgd-short", "adamw-8bit"]
    prepare_ops(
        ["ShareMemCommBuilder", "CPUAdamBuilder", "AsyncIOBuilder"],
        launch_environment(local_cpu_cluster(1)),
        tmp_path / "ops",
    )
    run_ranks_of([root / "tests" / "programs" / "chain.py", tmp_path, *chains], 1, tmp_path / "log")
    results = json.loads((tmp_path / "results.json").read_text())
    links = [link for name in chains for link in results[name]]
    assert len(links) == 11
    assert [link["swapped"] for link in links] == [True, False, True] + [False] * 8
    for link in links:
        assert link["loaded"] == {"parameter": 0, "master": 0, "state": 0}, link
        assert link["losses"][0] == pytest.approx(link["losses"][1], rel=1e-4), link
        assert link["error"] < 5e-2, link
    for link in links[:8]:
        # Optimizers of torch and of DeepSpeed round differently.
        assert link["stepped"]["master"] < 2e-2 * link["update"], link


STEPS = 6


def losses(run: Path) -> dict[object, float]:
    """The last loss of every step, and of the evaluation."""
    lines = [json.loads(line) for line in (run / METRICS).read_text().splitlines()]
    found: dict[object, float] = {line["step"]: line["loss"] for line in lines if line["event"] == "step"}
    return found | {line["event"]: line["loss"] for line in lines if line["event"] == "evaluation"}


@two_cores
def test_a_run_resumes_on_fewer_ranks_then_on_more_with_other_offload(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], forked_launch: None
) -> None:
    options: dict[str, Any] = {
        "model": WIDE, "steps": STEPS, "checkpoint_steps": 2, "keep_checkpoints": 3, "learning_rate": 3e-3,
        "evaluation_samples": 0,
    }  # fmt: skip
    prepare_ops(
        ["ShareMemCommBuilder", "CPUAdamBuilder", "AsyncIOBuilder"],
        launch_environment(local_cpu_cluster(2)),
        tmp_path / "ops",
    )
    folder = write_plan(tmp_path / "plan", 2, tile=30, **options)
    run = run_plan(folder, 2)
    expected = losses(run)
    assert set(expected) == {1, 2, 3, 4, 5, 6, "evaluation"}
    for step in (4, 6):
        shutil.rmtree(run / CHECKPOINT / f"step_{step}")
    (run / METRICS).unlink()

    write_plan(folder, 1, tile=30, force=True, **options | {"micro_batch": 16})
    assert memory_path(run, 1).exists()
    assert run_cli(["launch", str(folder), "--resume"]) == 0
    assert "resharding step 2 from 2 ranks to 1" in capsys.readouterr().out
    assert not memory_path(run, 1).exists()
    one = losses(run)
    assert set(one) == {3, 4, 5, 6, "evaluation"}
    # The order of summation differs, and Adam amplifies that.
    assert one == pytest.approx({step: expected[step] for step in one}, rel=2e-4)

    shutil.rmtree(run / CHECKPOINT / "step_6")
    (run / METRICS).unlink()
    nvme = tmp_path / "nvme"
    nvme.mkdir()
    write_plan(folder, 2, tile=52, force=True, offload="nvme-optimizer", nvme_path=nvme, **options)
    assert run_cli(["launch", str(folder), "--resume"]) == 0
    assert "resharding step 4 from 1 rank to 2" in capsys.readouterr().out
    two = losses(run)
    assert set(two) == {5, 6, "evaluation"}
    assert two == pytest.approx({step: expected[step] for step in two}, rel=5e-4)
    assert list((run / CHECKPOINT / "step_6").rglob("exp_avg_sq-*.swp"))

    # Export the checkpoint, whose states are on NVMe of two ranks, and evaluate it in one process.
    out = tmp_path / "model.safetensors"
    assert run_cli(["export", str(run), "--out", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["step"] == 6
    network = load_network(out)
    _, held_out = load_samples(parse_model_spec(WIDE), TrainingSpec())
    with torch.no_grad():
        loss = torch.nn.functional.cross_entropy(network(held_out.inputs), held_out.targets)
    assert float(loss) == pytest.approx(two["evaluation"], rel=1e-5)
