"""`translution launch`: the command on one machine and on several hosts, and the progress display."""

from __future__ import annotations

import io
import json
import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers.runs import TINY, write_plan
from rich.console import Console

from translution import planner
from translution.cli.commands.training import launch
from translution.cli.commands.training.launch import LaunchProgress
from translution.cli.main import run
from translution.distributed.launcher.launcher import LaunchResult
from translution.distributed.remote.rank_command import RankCommand
from translution.distributed.runs.mode import CHECK_SWAP, checks_swap
from translution.planner.hardware.cluster import local_cpu_cluster

Captured = pytest.CaptureFixture[str]


def test_plan_writes_a_folder_and_dry_run_prints_the_command(tmp_path: Path, root: Path, capsys: Captured) -> None:
    folder = tmp_path / "plan"
    model = str(root / "examples" / "digits.yaml")
    assert run(["plan", model, "--cluster", "cpu:1", "--out", str(folder), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    sizes = {peak["phase"]: peak["bytes"] for peak in document["plan"]["prediction"]["peaks"]}
    assert sizes["backward"] > sizes["between steps"] > 0
    assert run(["launch", str(folder), "--dry-run"]) == 0
    command = capsys.readouterr().out
    assert run(["launch", str(folder), "--dry-run", "--json"]) == 0
    dry = json.loads(capsys.readouterr().out)
    assert (dry["shell"], dry["run"]) == (command.rstrip("\n"), str(folder / "runs" / "001"))
    assert dry["environment"]["DS_ACCELERATOR"] == "cpu"
    assert set(dry["command"]) <= set(shlex.split(command))
    assert "deepspeed.launcher.launch --master_addr 127.0.0.1 --world_info=" in command
    assert "DS_ACCELERATOR=cpu" in command
    assert command.rstrip().endswith("runs/001")
    assert not (folder / "runs").exists()


def test_a_plan_for_several_nodes_needs_a_hostfile(
    tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)  # A value of the user's own would reach the ranks.
    folder, hosts = str(tmp_path / "plan"), tmp_path / "hosts"
    arguments = ["plan", "vit-base/16", "--cluster", "2x8xH100", "--data", "synthetic", "--out", folder]
    assert run([*arguments, "--precision", "bf16", "--micro-batch", "1"]) == 0
    assert f"run it: translution launch {folder} --hostfile {folder}/hostfile\n" in capsys.readouterr().out
    assert "./launch-ssh.sh " in (tmp_path / "plan" / "README.md").read_text()
    for words in ([], ["--dry-run"]):
        assert run(["launch", folder, *words]) == 2
        assert capsys.readouterr().err.startswith("translution: error: hostfile: is required for a plan of 2 nodes")
    hosts.write_text("one slots=8\nme@two slots=8\n")
    by_hand = ["--hostfile", str(hosts), "--no-ssh", "--node-rank"]
    for rank, run_folder, expected in (
        ("2", ["--run", "r"], "node_rank: 2 is not allowed: must be from 0 to 1"),
        ("1", [], "run: is required with --no-ssh"),
    ):
        assert run(["launch", folder, *by_hand, rank, *run_folder]) == 2
        assert expected in capsys.readouterr().err
    assert run(["launch", folder, *by_hand, "1", "--run", str(tmp_path / "r"), "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert f"--hostfile {hosts} --master_addr one --no_ssh --node_rank 1 --master_port 29500" in printed
    assert run(["launch", folder, "--hostfile", str(hosts), "--ssh-port", "2222", "--dry-run"]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("cd / && ")
    assert "--launcher pdsh --force_multi --no_ssh_check --ssh_port 2222" in captured.out
    decoded = RankCommand.from_payload(captured.out.split()[-1])
    assert (decoded.plan_folder, decoded.run) == (tmp_path / "plan", tmp_path / "plan" / "runs" / "001")
    assert decoded.environment["OMP_NUM_THREADS"] == "14"
    assert not (tmp_path / "plan" / "runs").exists()


def test_the_choice_to_check_swap_files_reaches_the_ranks_wherever_they_run(
    tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text("one slots=1\ntwo slots=1\n")
    offload: dict[str, Any] = {"model": TINY | {"dim": 256}, "tile": 16, "offload": "nvme", "nvme_path": tmp_path}
    here, several = (str(write_plan(tmp_path / str(n), 1, nodes=n, **offload)) for n in (1, 2))
    by_ssh = ["launch", several, "--hostfile", str(hosts), "--dry-run"]

    def payload() -> dict[str, str]:
        return RankCommand.from_payload(capsys.readouterr().out.split()[-1]).environment

    assert run(["launch", here, "--check-swap", "--dry-run"]) == 0
    assert f"{CHECK_SWAP}=1 " in capsys.readouterr().out
    assert run(["launch", here, "--dry-run"]) == 0
    assert CHECK_SWAP not in capsys.readouterr().out
    assert run([*by_ssh, "--check-swap"]) == 0
    assert payload()[CHECK_SWAP] == "1"
    assert run(by_ssh) == 0
    assert CHECK_SWAP not in payload()
    # The variable of this shell, which scripts of the plan folder also pass on.
    monkeypatch.setenv(CHECK_SWAP, "1")
    assert run(by_ssh) == 0
    assert payload()[CHECK_SWAP] == "1"
    assert checks_swap()
    monkeypatch.setenv(CHECK_SWAP, "0")
    assert not checks_swap()
    assert f"# export {CHECK_SWAP}=1\n" in (tmp_path / "1" / "environment.sh").read_text()


def test_a_plan_without_nvme_has_no_swap_files_to_check(tmp_path: Path, capsys: Captured) -> None:
    folder = write_plan(tmp_path / "plan", 1)
    for words in ([], ["--dry-run"]):
        assert run(["launch", str(folder), "--check-swap", *words]) == 2
        assert capsys.readouterr().err == (
            "translution: error: check-swap: is not allowed: the plan puts nothing on NVMe\n"
        )
    assert not (folder / "runs").exists()
    assert CHECK_SWAP not in (folder / "environment.sh").read_text()


@pytest.fixture
def timed() -> planner.Plan:
    """A plan whose step has a predicted time."""
    training = planner.TrainingSpec(precision="bf16", data="synthetic", micro_batch=1, steps=40)
    return planner.make_plan(planner.load_model("vit-tiny/56"), planner.load_cluster("8xH100"), training)


def step_line(number: int, seconds: float) -> dict[str, Any]:
    return {"event": "step", "step": number, "loss": 2.5, "seconds": seconds, "samples_per_s": 8 / seconds}


def shown(plan: planner.Plan, lines: list[dict[str, Any]], *, terminal: bool = False) -> tuple[str, LaunchProgress]:
    """Return what the progress display prints for lines of the metrics file."""
    file = io.StringIO()
    with LaunchProgress(
        Console(file=file, width=200, force_terminal=terminal, highlight=False, markup=False), plan
    ) as display:
        for line in lines:
            display.show(line)
    return file.getvalue(), display


def test_lines_show_measured_and_predicted_values(timed: planner.Plan) -> None:
    assert timed.time is not None
    lines = [step_line(number, 0.5 if number > 3 else 4.0) for number in range(1, 41)]
    lines.insert(3, {"event": "memory", "step": 3, "peak_bytes": 3 * 2**30})
    lines.insert(11, {"event": "evaluation", "step": 10, "loss": 2.25, "accuracy": 0.125, "samples": 48})
    lines.insert(22, {"event": "evaluation", "step": 20, "loss": 1.0, "accuracy": 0.25, "samples": 48})
    lines[22] |= {"top5_accuracy": 0.75, "perplexity": 2.71828}
    text, _ = shown(timed, lines)
    predicted = f"(predicted {timed.time.likely_s:.3g} s)"
    assert text.splitlines() == [
        f"step 1/40: loss 2.5000, 2 samples/s, 4 s per step {predicted}",
        f"step 3/40, memory 3.00 GiB (predicted {timed.prediction.peak_bytes / 2**30:.2f} GiB) of rank 0",
        "step 10/40, held-out: accuracy 12.50%, loss 2.2500 (48 samples)",
        f"step 20/40: loss 2.5000, 16 samples/s, 0.5 s per step {predicted}",
        "step 20/40, held-out: accuracy 25.00% (top-5 75.00%), loss 1.0000, perplexity 2.72 (48 samples)",
        f"step 40/40: loss 2.5000, 16 samples/s, 0.5 s per step {predicted}",
    ]


def test_a_long_evaluation_shows_its_progress(timed: planner.Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter([100.0, 105.0, 121.0, 121.0, 130.0])
    monkeypatch.setattr(launch, "time", SimpleNamespace(monotonic=lambda: next(seconds)))
    lines = [{"event": "evaluating", "step": 40, "done": done, "samples": 900} for done in (0, 100, 400, 500)]
    assert shown(timed, lines)[0].splitlines() == ["step 40/40: evaluating, 400 of 900 samples"]
    monkeypatch.undo()
    assert "evaluating, 500 of 900 samples" in shown(timed, lines, terminal=True)[0]


def test_a_resumed_run_is_shown_from_its_step(timed: planner.Plan) -> None:
    lines = [{"event": "resume", "step": 25}, step_line(26, 0.5), step_line(27, 0.5)]
    text, display = shown(timed, lines)
    assert [line.split(":")[0] for line in text.splitlines()] == ["step 26/40"]
    text, display = shown(
        timed, [*lines, {"event": "memory", "step": 3, "peak_bytes": 2**30}, step_line(28, 0.5)], terminal=True
    )
    task = display._progress.tasks[0]
    assert task.completed == 28
    assert task.fields["text"].endswith(f"memory 1.00 GiB (predicted {timed.prediction.peak_bytes / 2**30:.2f} GiB)")


def test_a_plan_without_rates_shows_no_predicted_time() -> None:
    plan = planner.make_plan(planner.load_model(TINY), local_cpu_cluster(1), planner.TrainingSpec(steps=5)).model_copy(
        update={"time": None}
    )
    text, _ = shown(plan, [step_line(1, 0.25)])
    assert text == "step 1/5: loss 2.5000, 32 samples/s, 0.25 s per step\n"


def test_json_has_the_result_on_stdout_and_the_progress_on_stderr(
    tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_plan(tmp_path / "plan", 1)

    def trained(_: Path, *, on_metrics: Any, on_message: Any, **__: Any) -> LaunchResult:
        on_message("starting 1 ranks")
        for step in (1, 2):
            on_metrics(step_line(step, 0.5))
        return LaunchResult(folder / "runs" / "001", ("program", "word"), {"A": "b"})

    monkeypatch.setattr(launch, "launch", trained)
    assert run(["launch", str(folder), "--json"]) == 0
    captured = capsys.readouterr()
    document = json.loads(captured.out)
    assert document == {
        "run": str(folder / "runs" / "001"),
        "command": ["program", "word"],
        "environment": {"A": "b"},
        "step": step_line(2, 0.5),
        "evaluation": None,
    }
    assert captured.err.startswith("starting 1 ranks\nstep 1/")
