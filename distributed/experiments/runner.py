"""Run an experiment: train each small model in one process, without DeepSpeed, several at a time."""

from __future__ import annotations

import math
import multiprocessing
import multiprocessing.connection
import os
import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from typing import TYPE_CHECKING

from pydantic import TypeAdapter

from translution.planner.common import Provenance, Schema, make_provenance, usable_cores
from translution.planner.config import DataKind, TrainingSpec
from translution.planner.costs import count_parameters

from .definitions import BATCH, Experiment, ModelVariant, Task

if TYPE_CHECKING:
    import torch

    from ..data.base import DataSource

_EVALUATED = 1024
"""Maximum number of held-out samples that a model is tested on."""
_WARMUP = 0.1
"""Fraction of the steps in which the learning rate rises."""
OnTrial = Callable[["Trial", int, int], None]
"""Called with a finished trial, the number of finished trials and the number of all trials."""
OnWait = Callable[[int, int, int], None]
"""Called with the number of finished trials, of all trials, and of trials that run at the same time."""
SECONDS_BETWEEN_SIGNS = 20.0
"""Longest time in which an experiment says nothing."""


class Trial(Schema):
    """One model trained with one seed."""

    variant: str
    """Name of the model."""
    train: DataKind
    """Training data."""
    seed: int
    parameters: int
    """Number of parameters of the model."""
    losses: dict[str, float]
    """Mean loss in nats on each test set."""
    accuracies: dict[str, float]
    """Fraction of correct predictions on each test set."""
    final_training_loss: float
    """Mean training loss in nats over the last 20 steps."""
    seconds: float
    """Duration of training in seconds, on one core while other trials use the other cores."""


class Summary(Schema):
    """A model's metric on one test set, over all seeds."""

    variant: str
    """Name of the model."""
    train: DataKind
    """Training data."""
    test: DataKind
    """Test data."""
    parameters: int
    """Number of parameters of the model."""
    mean: float
    """Mean of the metric over seeds."""
    deviation: float
    """Sample standard deviation of the metric over seeds; 0 for a single seed."""
    seeds: int
    """Number of seeds."""


class ExperimentResult(Schema):
    """The trials of an experiment, and how they were made."""

    experiment: Experiment
    quick: bool
    """True for a run with too few steps for meaningful results, which only shows that the parts work together."""
    steps: int
    """Training steps of each model."""
    batch: int
    """Samples per step."""
    trials: tuple[Trial, ...]
    seconds: float
    """Duration of the experiment in seconds."""
    made: Provenance
    """Command, time, machine and versions."""

    def value(self, trial: Trial, test: str) -> float:
        """Return the experiment's metric of a trial on a test set."""
        if self.experiment.metric == "accuracy":
            return trial.accuracies[test]
        return trial.losses[test] / math.log(2)

    def summaries(self) -> list[Summary]:
        """Return mean and standard deviation for every task, test set and model, in the experiment's order."""
        rows = []
        for task in self.experiment.tasks:
            for test in task.tests:
                for variant in self.experiment.variants:
                    own = [t for t in self.trials if (t.variant, t.train) == (variant.name, task.train)]
                    values = [self.value(trial, test) for trial in own]
                    rows.append(
                        Summary(
                            variant=variant.name,
                            train=task.train,
                            test=test,
                            parameters=own[0].parameters,
                            mean=statistics.fmean(values),
                            deviation=statistics.stdev(values) if len(values) > 1 else 0.0,
                            seeds=len(values),
                        )
                    )
        return rows


EXPERIMENT_RESULT: TypeAdapter[ExperimentResult] = TypeAdapter(ExperimentResult)


def _training(task: Task, seed: int, test: DataKind | None = None) -> TrainingSpec:
    return TrainingSpec(data=task.train, evaluation_data=test, seed=seed, micro_batch=BATCH)


def run_trial(variant: ModelVariant, task: Task, seed: int, steps: int, learning_rate: float) -> Trial:
    """Train and test a model; all random values depend on the seed.

    Args:
        variant: the model.
        task: training and test data.
        seed: seed of the weights, the order of the samples and the positions of digits.
        steps: optimizer steps, each on `BATCH` samples.
        learning_rate: peak learning rate.
    """
    import torch

    from translution.models import build

    from ..data.batching import micro_batches
    from ..data.loaders import load_samples
    from ..training.lr_schedule import learning_rate_factor

    torch.set_num_threads(1)
    torch.manual_seed(seed)
    network = build(variant.model)
    samples, _ = load_samples(variant.model, _training(task, seed), BATCH)
    batches = micro_batches(samples, micro_batch=BATCH, gradient_accumulation_steps=1, rank=0, world_size=1, seed=seed)
    optimizer = torch.optim.AdamW(network.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.05)
    recent: list[float] = []
    warmup, began = max(1, round(_WARMUP * steps)), time.perf_counter()
    for step in range(steps):
        (batch,) = next(batches)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * learning_rate_factor(step, warmup, steps + 1)
        loss = torch.nn.functional.cross_entropy(network(batch.inputs).flatten(0, -2), batch.targets.flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        recent = [*recent[-19:], loss.item()]
    seconds = time.perf_counter() - began
    losses: dict[str, float] = {}
    accuracies: dict[str, float] = {}
    for test in task.tests:
        _, held_out = load_samples(variant.model, _training(task, seed, test), BATCH)
        losses[test], accuracies[test] = _evaluate(network, held_out)
    return Trial(
        variant=variant.name,
        train=task.train,
        seed=seed,
        parameters=count_parameters(variant.model).total,
        losses=losses,
        accuracies=accuracies,
        final_training_loss=statistics.fmean(recent),
        seconds=seconds,
    )


def _evaluate(network: torch.nn.Module, held_out: DataSource) -> tuple[float, float]:
    """Return mean loss and accuracy over held-out samples; an evenly spaced subset if there are too many."""
    import torch

    network.eval()
    count = min(len(held_out), _EVALUATED)
    loss, right, targets = 0.0, 0, 0
    with torch.no_grad():
        for start in range(0, count, BATCH):
            index = torch.arange(start, min(start + BATCH, count)) * len(held_out) // count
            batch = held_out.select(index)
            logits, wanted = network(batch.inputs).flatten(0, -2), batch.targets.flatten()
            loss += float(torch.nn.functional.cross_entropy(logits, wanted, reduction="sum"))
            right += int((logits.argmax(-1) == wanted).sum())
            targets += len(wanted)
    network.train()
    return loss / targets, right / targets


def _jobs(experiment: Experiment, seeds: int) -> Iterator[tuple[ModelVariant, Task, int]]:
    """Yield all trials, the largest models first, so that no core has to wait for one at the end."""
    ordered = sorted(experiment.variants, key=lambda variant: -count_parameters(variant.model).total)
    for variant in ordered:
        for task in experiment.tasks:
            for seed in range(seeds):
                yield variant, task, seed


def _end_with_parent() -> None:
    """End this trial if the process that started it is killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    # A terminal sends Ctrl-C to every process; the experiment ends the trials itself.
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch(sentinel: int) -> None:
        multiprocessing.connection.wait([sentinel])
        os._exit(1)

    threading.Thread(target=watch, args=(parent.sentinel,), daemon=True).start()


def _ignore_trial(_: Trial, __: int, ___: int) -> None:
    """Default of `on_trial`: do nothing."""


def _ignore_wait(_: int, __: int, ___: int) -> None:
    """Default of `on_wait`: do nothing."""


def run_experiment(
    experiment: Experiment,
    *,
    quick: bool = False,
    seeds: int | None = None,
    steps: int | None = None,
    on_trial: OnTrial = _ignore_trial,
    on_wait: OnWait = _ignore_wait,
) -> ExperimentResult:
    """Run all trials of an experiment, one per core at a time; Ctrl-C or an error ends the running ones.

    Args:
        experiment: the experiment, as `find_experiment` returns it.
        quick: few steps and one seed, to check that it works.
        seeds: number of seeds; None is the experiment's, or 1 for a quick run.
        steps: training steps of each model; None is the experiment's number.
        on_trial: called with each finished trial, the number of finished trials and the number of all trials.
        on_wait: called at the start, and every `SECONDS_BETWEEN_SIGNS` in which no trial finishes, with the number of
            finished trials, that of all trials, and that of trials that run at the same time.

    Returns:
        The result, with the command that repeats it.

    Raises:
        InputError: if data cannot be read.
        MissingPackageError: if a package that reads the data is not installed.
    """
    command = [f"translution experiment {experiment.name}", *(["--quick"] if quick else [])]
    command += [f"--{flag} {value}" for flag, value in (("seeds", seeds), ("steps", steps)) if value is not None]
    count = seeds or (1 if quick else experiment.seeds)
    steps = steps or (experiment.quick_steps if quick else experiment.steps)
    jobs, trials, began = list(_jobs(experiment, count)), [], time.perf_counter()
    context = multiprocessing.get_context("spawn")
    workers = min(len(jobs), usable_cores())
    pool = ProcessPoolExecutor(max_workers=workers, mp_context=context, initializer=_end_with_parent)
    try:
        waiting = {pool.submit(run_trial, *job, steps, experiment.learning_rate) for job in jobs}
        on_wait(0, len(jobs), workers)
        while waiting:
            done, waiting = wait(waiting, timeout=SECONDS_BETWEEN_SIGNS, return_when=FIRST_COMPLETED)
            for future in done:
                trials.append(future.result())
                on_trial(trials[-1], len(trials), len(jobs))
            if not done:
                on_wait(len(trials), len(jobs), workers)
    except BaseException:
        # After Ctrl-C or an error nobody wants the other trials, for which the pool would wait.
        for process in multiprocessing.active_children():
            process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)
    order = {(variant.name, task.train, seed): n for n, (variant, task, seed) in enumerate(jobs)}
    trials.sort(key=lambda trial: order[trial.variant, trial.train, trial.seed])
    return ExperimentResult(
        experiment=experiment,
        quick=quick,
        steps=steps,
        batch=BATCH,
        trials=tuple(trials),
        seconds=time.perf_counter() - began,
        made=make_provenance(" ".join(command), ("torch", "numpy", "scikit-learn")),
    )
