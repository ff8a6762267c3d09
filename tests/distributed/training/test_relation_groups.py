"""Plans with relation parallelism train as one rank does, send the planned bytes, and are resumed and resharded."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from helpers.runs import run_ranks_of, write_plan
from programs.relation import training as program
from safetensors.torch import save_file
from torch import Tensor

from translution.distributed.checkpoint import export, verify_checkpoint
from translution.distributed.checkpoint.exporter import network_metadata
from translution.distributed.checkpoint.manifest import newest_checkpoint, run_checkpoints
from translution.distributed.checkpoint.reader import MASTER_COPY, CheckpointReader
from translution.distributed.checkpoint.unpickle import load_file
from translution.distributed.runs.folder import CHECKPOINT, METRICS
from translution.distributed.training.relation_groups import complete_norms
from translution.models import build, load_network
from translution.planner.common.machine import usable_cores
from translution.planner.config.model import parse_model_spec
from translution.planner.costs import relation_parallel_traffic, shared_gradient_traffic
from translution.planner.plans.plan import load_plan

pytestmark = pytest.mark.skipif(usable_cores() < 2, reason="needs two cores")

TOLERANCE = 2e-6
"""Largest difference in fp32, relative to the largest value: the order of sums differs."""
BF16_TOLERANCE = 0.02
STEPS, GLOBAL_BATCH, RESUMED = 4, 16, 2
MODEL = {"family": "vit", "image": 16, "patch": 4, "channels": 1, "classes": 10, "dim": 16, "depth": 1, "heads": 2}
UNEVEN = MODEL | {"depth": 2, "class_token": False, "pool": "mean"}
"""Has 49 relations: with three per tile, the first rank of two has a tile more, and hence more sub-groups."""
LANGUAGE = {"family": "gpt", "context": 12, "vocabulary": 31, "dim": 16, "depth": 1, "heads": 2, "operator": "alpha"}
LANGUAGE |= {"c1": 2, "c2": 4, "tied_embeddings": True}
WIDE = MODEL | {"dim": 160, "dropout": 0.1}
"""Only its tables are large enough for NVMe."""
SGD = {"optimizer": "sgd", "learning_rate": 0.1}
ADAM = {"epsilon": 1e-3, "learning_rate": 1e-2, "accumulation": 2}
"""A large epsilon: AdamW turns rounding errors of very small gradients into steps."""
CASES: dict[str, dict[str, Any]] = {
    "zero-0": {"stage": 0, **SGD},
    "zero-0-bf16": {"stage": 0, "precision": "bf16", **SGD},
    "zero-1": {"stage": 1, "model": MODEL | {"pool": "class", "class_token": True, "checkpointing": "block"}, **SGD},
    "zero-1-bf16": {"stage": 1, "precision": "bf16", "grad_accum_dtype": "fp32", **SGD},
    "zero-1-offloaded": {"stage": 1, "offload": "cpu-optimizer", **ADAM},
    "zero-2-alpha": {"stage": 2, "model": LANGUAGE, "data": "synthetic", "loss": "chunked", **SGD},
    "zero-3": {"stage": 3, "tile": 3, "model": UNEVEN, "zero_overrides": {"sub_group_elements": 200}, **SGD},
    "zero-3-offloaded": {"stage": 3, "offload": "cpu", "model": MODEL | {"checkpointing": "offload"}, **ADAM},
}
NVME = {"stage": 3, "tile": 26, "model": WIDE, "offload": "nvme", **ADAM}
RESUMED_CASES = ("zero-1-offloaded", "zero-3", "nvme")
SQUARES = ("zero-1", "zero-2-alpha", "zero-3", "zero-3-offloaded")
"""Cases that four ranks train in two groups."""
CROSSED = "zero-3-offloaded"
"""The plan under which four ranks resume what two have trained under ZeRO-1, and one what four have."""


class Run(NamedTuple):
    """A run of a case on ranks, in groups of ranks that share out the relations."""

    folder: Path
    case: str
    ranks: int
    relation_ranks: int
    checkpoint: Path | None = None
    weights: Path | None = None
    mark: str = ""

    @property
    def plan(self) -> Path:
        return self.folder / f"{self.case}-{self.ranks}-{self.relation_ranks}"

    @property
    def path(self) -> Path:
        return self.plan / "runs" / (self.mark or "new")

    def write(self) -> dict[str, str | None]:
        options: dict[str, Any] = {"model": MODEL, "tile": 8, "keep_checkpoints": STEPS, "evaluation_samples": 16}
        options |= {
            "checkpoint_steps": 1 if self.case == CROSSED else RESUMED,
            "steps": STEPS,
            **(CASES.get(self.case) or NVME),
        }
        if self.case == "nvme":
            options["nvme_path"] = self.folder / "drive"
            options["nvme_path"].mkdir(exist_ok=True)
        options["micro_batch"] = GLOBAL_BATCH // self.ranks // options.get("accumulation", 1)
        if not self.plan.exists():
            per_node = min(self.ranks, 2)
            nodes = self.ranks // per_node
            write_plan(self.plan, per_node, nodes=nodes, relation_parallel=self.relation_ranks, **options)
        paths = {"plan": self.plan, "run": self.path, "checkpoint": self.checkpoint, "weights": self.weights}
        return {name: None if path is None else str(path) for name, path in paths.items()}

    def resumed(self) -> Run:
        """The same run, continued from its checkpoint of step `RESUMED`."""
        return self._replace(checkpoint=self.checkpoint_of(RESUMED), mark="resumed")

    def checkpoint_of(self, step: int) -> Path:
        return self.path / CHECKPOINT / f"step_{step}"

    def steps(self) -> dict[int, tuple[float, float | None]]:
        lines = [json.loads(line) for line in (self.path / METRICS).read_text().splitlines()]
        return {line["step"]: (line["loss"], line["grad_norm"]) for line in lines if line["event"] == "step"}

    def evaluation(self) -> float:
        lines = [json.loads(line) for line in (self.path / METRICS).read_text().splitlines()]
        (loss,) = [line["loss"] for line in lines if line["event"] == "evaluation"]
        return float(loss)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Everything in the last checkpoint, by parameter and kind, without tiles."""
        ref = newest_checkpoint(self.path / CHECKPOINT)
        assert ref is not None
        reader = CheckpointReader(ref)
        for name, numel in reader.numels.items():
            for kind in (MASTER_COPY, *reader.kinds):
                out = torch.full((numel,), float("nan"))
                reader.read(name, kind, 0, out)
                yield f"{name} {kind}", out


def start(folder: Path, runs: list[Run]) -> list[list[dict[str, int]]]:
    """Make the runs, of equally many ranks, in one start of those; return what each rank has counted for each run."""
    ranks = runs[0].ranks
    jobs = folder / f"jobs-{ranks}.json"
    jobs.write_text(json.dumps([run.write() for run in runs]))
    run_ranks_of([program.__file__, folder, jobs], ranks, folder / f"log-{ranks}")
    return [json.loads((folder / f"ranks_{ranks}_rank_{rank}.json").read_text()) for rank in range(ranks)]


def relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-30))


def assert_equal_training(run: Run, reference: Run) -> None:
    """Compare losses and norms of all steps that a run has done, and all values of its last checkpoint."""
    tolerance = BF16_TOLERANCE if "bf16" in run.case else TOLERANCE
    expected = reference.steps()
    for step, found in run.steps().items():
        for ours, theirs in zip(found, expected[step], strict=True):
            assert ours == (None if theirs is None else pytest.approx(theirs, rel=tolerance)), (run, step)
    assert run.evaluation() == pytest.approx(reference.evaluation(), rel=tolerance), run
    if "bf16" not in run.case:
        theirs = dict(reference.tensors())
        ours = dict(run.tensors())
        assert ours.keys() == theirs.keys()
        found = {name: relative(value, theirs[name]) for name, value in ours.items()}
        worst = max(found, key=lambda name: found[name])
        assert found[worst] < 10 * TOLERANCE, (run, worst, found[worst])


@pytest.mark.parametrize(
    ("own", "others", "expected"),
    [([1.0, 2.0, 2.0], 16.0, 5.0), ([0.0], 4.0, 2.0), ([3.0, -1.0], 16.0, -1.0), ([3.0], float("inf"), -1.0)],
)
def test_norms_of_sub_groups_are_added_up_once(
    own: list[float], others: float, expected: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    class Optimizer:
        def _model_parallel_all_reduce(self, tensor: Tensor, op: object) -> None:
            raise AssertionError("once per sub-group")

        def _get_norm_groups(self) -> list[Tensor]:
            for norm in own:
                self._model_parallel_all_reduce(torch.tensor(norm), None)
            return [torch.tensor(norm) for norm in own]

    def add_others(tensor: Tensor, group: object) -> None:
        calls.append(group)
        tensor.add_(others)

    monkeypatch.setattr(torch.distributed, "all_reduce", add_others)
    optimizer = Optimizer()
    complete_norms(optimizer, SimpleNamespace(group="group"))  # type: ignore[arg-type]
    (norm,) = optimizer._get_norm_groups()
    assert norm.item() == expected
    assert calls == ["group"]
    with pytest.raises(AssertionError, match="once per sub-group"):  # The overflow check still needs it.
        optimizer._model_parallel_all_reduce(norm, None)


@pytest.mark.ranks
def test_ranks_that_share_out_the_relations_train_as_one_rank(tmp_path: Path) -> None:
    """Three starts of ranks serve all checks, of thirty runs: while other tests run it takes a minute."""
    weights = tmp_path / "network.safetensors"
    torch.manual_seed(1)
    tensors = {name: value.detach() for name, value in build(parse_model_spec(UNEVEN)).named_parameters()}
    save_file(tensors, weights, network_metadata(parse_model_spec(UNEVEN)))

    first = {case: Run(tmp_path, case, 2, 2) for case in (*CASES, "nvme")}
    again = [run.resumed() for run in map(first.__getitem__, RESUMED_CASES)]
    from_weights = first["zero-3"]._replace(weights=weights, mark="weights")
    two = [*first.values(), *again, from_weights]
    counted = start(tmp_path, two)

    squares = [Run(tmp_path, case, 4, 2) for case in SQUARES]
    saved = first["zero-1-offloaded"].checkpoint_of(RESUMED)
    crossed = Run(tmp_path, CROSSED, 4, 2, checkpoint=saved, mark="crossed")
    four = [*squares, Run(tmp_path, "zero-1", 4, 4), crossed]
    counted_of_four = start(tmp_path, four)

    references = {case: Run(tmp_path, case, 1, 1) for case in CASES}
    back = Run(tmp_path, CROSSED, 1, 1, checkpoint=crossed.checkpoint_of(3), mark="back")
    weights_reference = from_weights._replace(ranks=1, relation_ranks=1)
    start(tmp_path, [*references.values(), back, weights_reference])

    others = dict.fromkeys(("crossed", "back"), references["zero-1-offloaded"]) | {"weights": weights_reference}
    for run in (*two, *four, back):
        if run.case != "nvme" and run.mark != "resumed":
            assert_equal_training(run, others.get(run.mark) or references[run.case])
    assert_resumed_to_the_bit(again, first)
    assert (set(crossed.steps()), set(back.steps())) == ({3, 4}, {4})
    assert_whole(first["zero-3"], tmp_path / "exported.safetensors")
    assert_shared_parameters_are_the_same(squares[0])
    assert_bytes_are_planned(two, counted)
    assert_bytes_are_planned(four, counted_of_four)
    sub_groups = [ranks[list(first).index("zero-3")]["sub_groups"] for ranks in counted]
    assert sub_groups[0] > sub_groups[1] > 1


def assert_resumed_to_the_bit(again: list[Run], first: dict[str, Run]) -> None:
    for run in again:
        whole = first[run.case]
        assert run.steps() == {step: values for step, values in whole.steps().items() if step > RESUMED}
        assert run.evaluation() == whole.evaluation()
        expected = dict(whole.tensors())
        found = dict(run.tensors())
        assert found.keys() == expected.keys()
        assert all(torch.equal(value, expected[name]) for name, value in found.items()), run


def assert_whole(run: Run, exported: Path) -> None:
    """A run's checkpoints name all files, and its network is exported."""
    refs = run_checkpoints(run.path)
    assert [ref.manifest.step for ref in refs] == [RESUMED, STEPS]
    for ref in refs:
        verify_checkpoint(ref)
        files = {path.relative_to(ref.path).as_posix() for path in ref.path.rglob("*") if path.is_file()}
        assert files == {*ref.manifest.files, "manifest.json"} == {*ref.manifest.checksums, "manifest.json"}
        assert {f"zero_pp_rank_0_mp_rank_0{place}_optim_states.pt" for place in range(2)} < files
    export(run.path, exported)
    stored = dict(run.tensors())
    for name, value in load_network(exported).named_parameters():
        assert torch.equal(value.detach().flatten(), stored[f"{name} {MASTER_COPY}"])


def assert_shared_parameters_are_the_same(run: Run) -> None:
    """All parameters but tables are the same on both ranks of a group, to the bit."""
    files = [run.checkpoint_of(STEPS) / f"mp_rank_0{place}_model_states.pt" for place in range(2)]
    first, second = (load_file(file)["module"] for file in files)
    shared = [name for name in first if ".tables." not in name]
    assert len(shared) > 10
    assert all(torch.equal(first[name], second[name]) for name in shared)


def assert_bytes_are_planned(runs: list[Run], counted: list[list[dict[str, int]]]) -> None:
    for number, run in enumerate(runs):
        plan = load_plan(run.plan)
        assert all(found[number]["layers_that_drop_as_one_rank"] == plan.model.depth for found in counted)
        training, size = plan.training, 2 if plan.training.precision == "bf16" else 4
        if run.checkpoint is not None or plan.model.checkpointing != "none":
            continue  # The counted step was done before; recomputation exchanges more.
        passes, group = training.gradient_accumulation_steps, run.relation_ranks
        for rank, found in enumerate(counted):
            batch = {"ranks": group, "batch": training.micro_batch, "value_bytes": size, "rank": rank % group}
            batch["dropout_ranks"] = run.ranks
            sent = found[number]
            assert sent["exchanged"] == passes * relation_parallel_traffic(plan.model, **batch).total, (run, rank)
            reduced = 2 * (group - 1) * sent["reduced"] // group
            assert reduced == passes * shared_gradient_traffic(plan.model, ranks=group, value_bytes=size), (run, rank)
