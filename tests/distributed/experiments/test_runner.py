"""Experiments: their models, how they run, and the results that they write."""

from __future__ import annotations

import json
import math
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.waiting import wait_until

from translution.cli.main import run
from translution.distributed.experiments import definitions as experiments
from translution.distributed.experiments import runner as experiment
from translution.distributed.experiments.definitions import DYNAMIC, EXPERIMENT_NAMES, STATIC, find_experiment
from translution.distributed.experiments.runner import EXPERIMENT_RESULT, ExperimentResult, Trial, run_trial
from translution.planner.common.provenance import make_provenance
from translution.planner.common.schema import parse_json
from translution.planner.costs.parameters import count_parameters
from translution.reports.sections.experiment import experiment_cells, experiment_markdown, experiment_picture


def trial(name: str, train: str, seed: int, *, accuracies: dict[str, float]) -> Trial:
    losses = {test: -math.log(value) for test, value in accuracies.items()}
    values = {"variant": name, "train": train, "seed": seed, "parameters": 1000 * len(name), "losses": losses}
    return Trial.model_validate(values | {"accuracies": accuracies, "final_training_loss": 0.5, "seconds": 1.0})


def example_result() -> ExperimentResult:
    """Return a result with known figures."""
    asked = find_experiment("shift")
    asked = asked.model_copy(update={"variants": asked.variants[-2:]})
    trials = []
    for variant, base in zip(asked.variants, (0.5, 0.25), strict=True):
        for seed in range(3):
            value = base + seed / 100
            found = {"digits-static": 2 * value - 0.1 * base, "digits-patches": value, "digits-shifted": value}
            trials.append(trial(variant.name, "digits-static", seed, accuracies=found))
            trials.append(trial(variant.name, "digits-shifted", seed, accuracies={"digits-shifted": value}))
    return ExperimentResult(
        experiment=asked, quick=False, steps=7, batch=64, trials=tuple(trials), seconds=12.0,
        made=make_provenance("translution experiment shift"),
    )  # fmt: skip


def test_summaries_are_mean_and_deviation_over_seeds() -> None:
    rows = {(row.variant, row.train, row.test): row for row in example_result().summaries()}
    assert len(rows) == 8
    row = rows["full Translution", "digits-shifted", "digits-shifted"]
    assert (row.mean, row.deviation, row.seeds) == (pytest.approx(0.26), pytest.approx(0.01), 3)
    text = experiment_markdown(example_result())
    assert "| full Translution | 16.00 k | 49.5% ± 2.0 | 26.0% ± 1.0 | 26.0% ± 1.0 | 26.0% ± 1.0 |" in text
    assert (
        "| model | parameters | centred → centred | centred → patches away | centred → anywhere | anywhere → anywhere |"
        in text
    )
    assert "over 3 seeds" in text
    assert "`translution experiment shift`, " in text
    shown = json.dumps(experiment_picture(example_result()), ensure_ascii=False)
    assert "α-Translution (13.00 k)" in shown
    assert len(set(re.findall(r'"trained \w+, tested [\w ]+"', shown))) == 4


def test_bits_per_byte_are_nats_over_the_logarithm_of_two() -> None:
    asked = find_experiment("language")
    result = example_result().model_copy(update={"experiment": asked})
    found = trial("x", "stdlib", 0, accuracies={"stdlib": 0.25})
    assert result.value(found, "stdlib") == pytest.approx(2.0)


def test_the_wider_absolute_model_has_no_fewer_parameters() -> None:
    relative, same, wide = [count_parameters(variant.model).total for variant in find_experiment("ablation").variants]
    assert same < relative <= wide < 1.2 * relative


def test_the_experiments_compare_the_models_of_the_paper() -> None:
    models = {name: [variant.model for variant in find_experiment(name).variants] for name in EXPERIMENT_NAMES}
    assert [model.operator for model in models["shift"]] == [
        "attention", "attention", "bias", "shaw", "alpha", "translution",
    ]  # fmt: skip
    assert find_experiment("shift").tasks == (STATIC, DYNAMIC)
    assert [(model.c1, model.c2) for model in models["rank"] if model.operator == "alpha"] == [
        (width, width) for width in (1, 2, 4, 8, 16)
    ]
    assert {model.roles for model in models["roles"]} == {"qkv", "kv", "qv", "qk", "q", "k", "v"}
    for own in models.values():
        assert len({model.depth for model in own}) == 1


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_no_trial_outlives_an_experiment_that_ends_early(number: signal.Signals, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "translution.cli", "experiment", "shift", "--steps", "100000", "--seeds", "1"]
    errors = tmp_path / "errors"
    with (
        errors.open("w") as file,
        subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=file) as program,
    ):
        try:
            trials = wait_until(
                lambda: [child for child in _children(program.pid) if "spawn_main" in _command_of(child)]
            )
            wait_until(lambda: "0 of 12 trials finished" in errors.read_text())
            program.send_signal(number)
            code = program.wait(60)
        finally:
            program.kill()
    wait_until(lambda: not any("spawn_main" in _command_of(child) for child in trials))
    assert code == (130 if number == signal.SIGINT else -number)
    if number == signal.SIGINT:
        assert errors.read_text().splitlines()[-1] == "translution: error: interrupted"
        assert "Traceback" not in errors.read_text()


def _command_of(process: int) -> str:
    try:
        return Path(f"/proc/{process}/cmdline").read_text()
    except OSError:
        return ""


def _children(process: int) -> list[int]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = stat.read_text().rpartition(")")[2].split()[1]
        except OSError:
            continue
        if int(parent) == process:
            found.append(int(stat.parent.name))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPERIMENT_NAMES)
def test_every_model_of_every_experiment_trains(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experiment, "_EVALUATED", 64)
    asked = find_experiment(name)
    for variant in asked.variants:
        found = run_trial(variant, asked.tasks[0], 0, 1, asked.learning_rate)
        assert found.parameters == count_parameters(variant.model).total
        assert set(found.losses) == set(asked.tasks[0].tests)
        chance = math.log(10 if variant.model.family == "vit" else 256)
        assert all(0.5 * chance < loss < 1.7 * chance for loss in found.losses.values())


@pytest.mark.slow
def test_a_trial_learns_and_is_reproducible() -> None:
    asked = find_experiment("shift")
    variant = asked.variants[0]
    first, again = (run_trial(variant, STATIC, 3, 60, asked.learning_rate) for _ in range(2))
    assert first.model_copy(update={"seconds": 0.0}) == again.model_copy(update={"seconds": 0.0})
    assert first.accuracies["digits-static"] > 0.3
    assert first.losses != run_trial(variant, STATIC, 4, 60, asked.learning_rate).losses


@pytest.mark.slow
def test_a_quick_experiment_writes_figures_table_and_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    short = find_experiment("shift").model_copy(update={"variants": find_experiment("shift").variants[:2]})
    monkeypatch.setitem(experiments._EXPERIMENTS, "shift", lambda: short)
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "experiments" / "shift"
    words = ["experiment", "shift", "--quick", "--seeds", "2"]
    assert run([*words, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    result = parse_json(EXPERIMENT_RESULT, (out / "result.json").read_text(), "result")
    assert document["summaries"] == [row.model_dump() for row in result.summaries()]
    assert (result.quick, result.steps, len(result.trials)) == (True, short.quick_steps, 8)
    table = (out / "README.md").read_text()
    assert table.startswith(experiment_markdown(result))
    assert "A quick run with too few steps" in table
    assert result.made.command == "translution experiment shift --quick --seeds 2"
    assert (out / "figure.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (out / "figure.svg").read_text()
    assert run(words) == 2
    assert "exists already" in capsys.readouterr().err


@pytest.mark.parametrize("name", EXPERIMENT_NAMES)
def test_committed_results_match_the_current_experiments_and_their_tables(root: Path, name: str) -> None:
    folder = root / "reports" / "experiments" / name
    result = parse_json(EXPERIMENT_RESULT, (folder / "result.json").read_text(encoding="utf-8"), "result")
    asked = find_experiment(name)
    assert result.experiment == asked
    assert (result.quick, result.steps, result.made.command) == (False, asked.steps, f"translution experiment {name}")
    seeds = {trial.seed for trial in result.trials}
    assert seeds == set(range(asked.seeds))
    assert len(result.trials) == len(asked.variants) * len(asked.tasks) * len(seeds)
    assert result.seconds <= 15 * 60
    assert (folder / "README.md").read_text(encoding="utf-8").startswith(experiment_markdown(result))
    page = (root / "docs" / "experiments.md").read_text(encoding="utf-8")
    for row in experiment_cells(result)[1]:
        assert f"| {' | '.join(row)} |" in page
