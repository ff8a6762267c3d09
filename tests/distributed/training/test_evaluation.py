"""Evaluation of held-out samples: each counts once, progress is written, and a signal ends it."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.runs import TINY

from translution.distributed.data.base import Samples
from translution.distributed.runs.folder import METRICS, make_run_folders
from translution.distributed.runs.progress import Progress
from translution.distributed.runs.status import read_status
from translution.distributed.system.signals import StopRequest
from translution.distributed.training import evaluation, run_log
from translution.distributed.training.engine import Engine
from translution.planner.config.model import parse_model_spec
from translution.planner.config.training import TrainingSpec
from translution.planner.hardware.cluster import local_cpu_cluster
from translution.planner.plans.build import make_plan
from translution.planner.plans.evaluation import EvaluationPlan
from translution.planner.plans.plan import Plan


class FakeEngine:
    """One rank whose logits are the first values of a sample, three of them by default."""

    classes = 3

    rank, world_size = 0, 1
    scores = Engine.scores

    def __init__(self, plan: Plan) -> None:
        self.plan, self.progress = plan, Progress()
        self.modes: list[str] = []
        self.batches: list[int] = []
        self.deepspeed_engine = SimpleNamespace(
            device=torch.device("cpu"), eval=lambda: self.modes.append("eval"), train=lambda: self.modes.append("train")
        )

    def forward(self, batch: Samples) -> torch.Tensor:
        assert not torch.is_grad_enabled()
        self.batches.append(len(batch))
        return batch.inputs[:, : self.classes]

    def mean_over_ranks(self, *values: float) -> list[float]:
        return list(values)


def plan_of(**training: Any) -> Plan:
    values = {"micro_batch": 2, "data": "digits"} | training
    return make_plan(parse_model_spec(TINY), local_cpu_cluster(1), TrainingSpec(**values))


@pytest.fixture
def held_out() -> Samples:
    generator = torch.Generator().manual_seed(0)
    return Samples(torch.randn(11, 4, generator=generator), torch.randint(3, (11,), generator=generator))


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor: None)
    plan_of().write(tmp_path / "plan")
    make_run_folders(tmp_path / "run", tmp_path / "plan")
    return tmp_path / "run"


def evaluator(plan: Plan, run: Path) -> evaluation.Evaluator:
    log = run_log.RunLog(plan, run, 0, writes_metrics=True)
    return evaluation.Evaluator(plan, FakeEngine(plan), log, StopRequest())  # type: ignore[arg-type]  # a stand-in


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / METRICS).read_text().splitlines()]


@pytest.mark.parametrize("micro_batch", [2, 4, 11, 16])
def test_each_sample_counts_once(
    micro_batch: int, run: Path, held_out: Samples, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_log, "PROGRESS_SECONDS", 0.0)
    plan = plan_of().model_copy(update={"evaluation": EvaluationPlan(micro_batch=micro_batch, max_samples=None)})
    own = evaluator(plan, run)
    own.evaluate(held_out, 7)
    *progress, result = metrics(run)
    logits = held_out.inputs[:, :3]
    expected = torch.nn.functional.cross_entropy(logits, held_out.targets)
    assert result["loss"] == pytest.approx(float(expected), rel=1e-6)
    assert result["accuracy"] == pytest.approx(float((logits.argmax(-1) == held_out.targets).float().mean()))
    assert (result["event"], result["step"], result["samples"]) == ("evaluation", 7, 11)
    starts = list(range(0, 11, micro_batch))
    assert [(line["event"], line["done"], line["samples"]) for line in progress] == [
        ("evaluating", start, 11) for start in starts
    ]
    assert own.engine.batches == [micro_batch] * len(starts)  # type: ignore[attr-defined]  # a stand-in
    assert own.engine.modes == ["eval", "train"]  # type: ignore[attr-defined]
    status = read_status(run, 0)
    assert status is not None
    assert (status.state, status.step, status.message) == ("evaluating", 7, "11 held-out samples")


def test_the_five_most_likely_classes_are_counted_too(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeEngine, "classes", 10)
    generator = torch.Generator().manual_seed(1)
    samples = Samples(torch.randn(53, 10, generator=generator), torch.randint(10, (53,), generator=generator))
    plan = plan_of().model_copy(update={"evaluation": EvaluationPlan(micro_batch=8, max_samples=None)})
    result = evaluator(plan, run).evaluate(samples, 1)
    assert result is not None
    order = samples.inputs.argsort(dim=1, descending=True)
    places = [row.tolist().index(target) for row, target in zip(order, samples.targets.tolist(), strict=True)]
    assert result.accuracy == pytest.approx(sum(place == 0 for place in places) / 53)
    assert result.top5_accuracy == pytest.approx(sum(place < 5 for place in places) / 53)
    assert result.accuracy < result.top5_accuracy < 1
    assert result.perplexity is None
    written = metrics(run)[-1]
    assert written["top5_accuracy"] == result.top5_accuracy
    assert "perplexity" not in written


def test_a_language_model_has_a_perplexity(run: Path) -> None:
    spec = {"family": "gpt", "context": 4, "vocabulary": 10, "dim": 8, "depth": 1, "heads": 1}
    plan = make_plan(parse_model_spec(spec), local_cpu_cluster(1), TrainingSpec(data="synthetic", evaluation_samples=0))
    own = evaluator(plan, run)
    generator = torch.Generator().manual_seed(1)
    logits, targets = torch.randn(3, 4, 10, generator=generator), torch.randint(10, (3, 4), generator=generator)
    own.engine.forward = lambda batch: batch.inputs  # type: ignore[method-assign]
    result = own.evaluate(Samples(logits, targets), 1)
    assert result is not None
    likely = logits.log_softmax(-1).gather(-1, targets[..., None])
    assert result.perplexity == pytest.approx(float((-likely).mean().exp()), rel=1e-6)
    assert result.top5_accuracy is None


@pytest.mark.parametrize(("loss", "expected"), [(0.0, 1.0), (1e4, None), (float("nan"), None), (float("inf"), None)])
def test_a_perplexity_above_every_float_is_left_out(loss: float, expected: float | None) -> None:
    assert evaluation.perplexity(loss) == expected


def test_progress_is_written_every_few_seconds(run: Path, held_out: Samples) -> None:
    plan = plan_of().model_copy(update={"evaluation": EvaluationPlan(micro_batch=1, max_samples=None)})
    evaluator(plan, run).evaluate(held_out, 1)
    assert [line["event"] for line in metrics(run)] == ["evaluating", "evaluation"]


def test_a_signal_ends_an_evaluation_without_a_result(run: Path, held_out: Samples) -> None:
    plan = plan_of().model_copy(update={"evaluation": EvaluationPlan(micro_batch=4, max_samples=None)})
    own = evaluator(plan, run)
    own.stop.name = "SIGUSR1"
    own.evaluate(held_out, 1)
    assert [line["event"] for line in metrics(run)] == ["evaluating"]
    assert own.engine.batches == []  # type: ignore[attr-defined]  # a stand-in
    assert own.engine.modes == ["eval", "train"]  # type: ignore[attr-defined]


def test_a_measurement_evaluates_two_passes_and_writes_nothing(run: Path, held_out: Samples) -> None:
    plan = plan_of().model_copy(update={"evaluation": EvaluationPlan(micro_batch=2, max_samples=None)})
    own = evaluator(plan, run)
    own.evaluate_few(held_out)
    assert own.engine.batches == [2, 2]  # type: ignore[attr-defined]  # a stand-in
    assert not (run / METRICS).exists()


def test_the_number_of_samples_is_the_planned_one() -> None:
    plan = plan_of(evaluation_samples=5)
    assert evaluation.evaluation_size(plan, 364) == (5, 5)
    assert evaluation.evaluation_size(plan, 3) == (3, 5)
    assert evaluation.evaluation_size(plan_of(evaluation_samples="none"), 364)[0] == 0


def test_plans_of_earlier_versions_evaluate_as_they_did() -> None:
    old = {"evaluation": None}
    assert evaluation.evaluation_size(plan_of(evaluation_samples=0).model_copy(update=old), 364) == (364, 2)
    assert evaluation.evaluation_size(plan_of(evaluation_samples=10).model_copy(update=old), 364) == (10, 2)


def test_no_samples_are_no_evaluation(run: Path, held_out: Samples) -> None:
    evaluator(plan_of(evaluation_samples="none"), run).evaluate(held_out, 1)
    assert not (run / METRICS).exists()
