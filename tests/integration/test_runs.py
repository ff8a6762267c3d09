"""Runs with real processes, gloo, DeepSpeed's engine and launcher."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.runs import TINY, run_plan, run_ranks_of, write_plan
from helpers.waiting import PATIENCE_S, wait_until

from translution.cli.main import run as run_cli
from translution.distributed.data.batching import micro_batches
from translution.distributed.data.digits import load_digits
from translution.distributed.runs.folder import METRICS, log_path, make_run_folders, memory_path
from translution.distributed.runs.measurement import read_memory
from translution.distributed.runs.progress import read_progress
from translution.distributed.runs.rank_watch import HANG_MINUTES
from translution.distributed.runs.status import read_status
from translution.distributed.runs.verdict import raise_unless_finished
from translution.distributed.runs.watchdog import process_is_alive
from translution.distributed.system.environment import free_port
from translution.models import build
from translution.planner.common.errors import RunFailedError
from translution.planner.common.machine import usable_cores
from translution.planner.config.model import parse_model_spec

# The launcher's check of the number of cores is tested elsewhere.
pytestmark = pytest.mark.skipif(usable_cores() < 2, reason="needs two cores")


def metrics(run: Path, event: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / METRICS).read_text().splitlines()]
    return [line for line in lines if line["event"] == event]


def stepping(run: Path) -> bool:
    """Return whether a run has done a step, which rank 0 notes after all ranks have joined."""
    return (run / METRICS).exists() and bool(metrics(run, "step"))


FUSED = {"TRITON_INTERPRET": "1", "TRANSLUTION_IMPLEMENTATION": "fused", "MALLOC_ARENA_MAX": "2"}
"""Ranks with the fused kernels in Triton's interpreter; a process of which Triton was imported without it has none."""


@pytest.mark.parametrize(
    ("ranks", "checkpointing", "environment"),
    [(1, "none", {}), (2, "none", FUSED), (2, "block", {}), (2, "offload", {})],
    ids=["one rank", "fused kernels", "block", "offload"],
)
def test_one_tile_is_gathered_at_a_time_and_gradients_are_those_of_one_process(
    tmp_path: Path,
    ranks: int,
    checkpointing: str,
    environment: dict[str, str],
    root: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    # The interpreter takes milliseconds for each relation: 12 of them in place of 52.
    image, tile = (8, 3) if environment else (16, 13)
    model = TINY | {"checkpointing": checkpointing, "image": image}
    folder = write_plan(tmp_path / "plan", ranks, tile=tile, micro_batch=16 // ranks, model=model)
    make_run_folders(tmp_path / "run", folder)
    out = tmp_path / "counts.json"
    run_ranks_of([root / "tests" / "programs" / "tiles.py", folder, tmp_path / "run", out], ranks, tmp_path / "log")
    counts = json.loads(out.read_text())
    # 52 relations in tiles of 13, or 12 in tiles of 3; a tile of logits and one of values each, in 2 layers.
    assert counts["tiles"] == 2 * 2 * 4
    assert len(counts["kernels"]) == (5 if environment else 0)
    # Softmax runs between the tiles, with none gathered; every other operation has only its own tile gathered.
    assert sorted(set(counts["forward"])) == sorted(set(counts["backward"])) == [0, 1]
    assert len(counts["backward"]) == (2 if environment else 3) * (counts["tiles"] + 2)
    # Activation checkpointing runs the forward of every tile again in backward.
    assert len(counts["forward"]) == len(counts["backward"]) * (1 if checkpointing == "none" else 2)

    spec = parse_model_spec(TINY | {"image": image})
    torch.manual_seed(0)
    network = build(spec, tile_relations=tile, implementation="grouped")
    samples, _ = load_digits(spec)
    (batch,) = next(micro_batches(samples, micro_batch=16, gradient_accumulation_steps=1, rank=0, world_size=1, seed=0))
    torch.nn.functional.cross_entropy(network(batch.inputs), batch.targets).backward()
    for name, grad in torch.load(out.with_suffix(".pt")).items():
        expected = network.get_parameter(name).grad
        # In fp32 the mean over two halves is rounded once more than the mean over all samples.
        torch.testing.assert_close(
            grad, expected, rtol=1e-4, atol=1e-6 if ranks == 2 else 1e-7, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_losses_do_not_depend_on_the_number_of_ranks_or_on_accumulation(tmp_path: Path) -> None:
    """Two ranks of 8, one rank of 16 and one rank of 8 twice train on the same global batches in fp32."""
    shapes = {"two ranks": (2, 8, 1), "one rank": (1, 16, 1), "accumulated": (1, 8, 2)}
    losses = {}
    for name, (ranks, micro_batch, gradient_accumulation_steps) in shapes.items():
        folder = write_plan(
            tmp_path / name,
            ranks,
            steps=6,
            micro_batch=micro_batch,
            gradient_accumulation_steps=gradient_accumulation_steps,
            learning_rate=3e-3,
        )
        run = run_plan(folder, ranks)
        steps = metrics(run, "step")
        losses[name] = [step["loss"] for step in steps] + [metrics(run, "evaluation")[0]["loss"]]
        assert [step["step"] for step in steps] == [1, 2, 3, 4, 5, 6]
        assert steps[0]["learning_rate"] == pytest.approx(3e-3)
    for name in ("two ranks", "accumulated"):
        # fp32 rounding, amplified by Adam over six steps.
        assert losses[name] == pytest.approx(losses["one rank"], rel=2e-4)
    assert len(set(losses["one rank"])) == 7


def test_the_command_line_runs_a_plan_and_verifies_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], root: Path
) -> None:
    folder = tmp_path / "plan"
    arguments = [str(root / "examples" / "digits.yaml"), "--cluster", "cpu:2", "--out", str(folder), "--steps", "5"]
    arguments += ["--stage", "3", "--offload", "none", "--micro-batch", "8"]
    assert run_cli(["plan", *arguments]) == 0
    assert run_cli(["launch", str(folder)]) == 0
    printed = capsys.readouterr().out
    assert "held-out: accuracy" in printed
    assert run_cli(["verify", str(folder), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["run"] == str(folder / "runs" / "001")
    assert 0 <= document["accuracy"] <= 1
    assert set(document["files"]) == {"metrics", "measured memory", "checkpoint"}
    assert run_cli(["verify", str(folder)]) == 0
    assert "predicted / measured" in capsys.readouterr().out
    memory = read_memory(folder / "runs" / "001", 1)
    assert memory is not None
    assert memory.process_peak_bytes > memory.peak_bytes > memory.resident_bytes > 0


def test_token_files_train_a_gpt_model_on_two_ranks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Token files are memory-mapped, not tensors, so the measured memory equals the predicted one."""
    (tmp_path / "text").write_text("abcdefghijklmnopqrstuvwxyz\n" * 400)
    assert run_cli(["prepare", str(tmp_path / "text"), "--out", str(tmp_path / "data")]) == 0
    model = {"family": "gpt", "context": 27, "vocabulary": 256, "dim": 16, "depth": 2, "heads": 2}
    training = {"data": "tokens", "data_path": str(tmp_path / "data"), "micro_batch": 4, "learning_rate": 1e-2}
    folder = write_plan(tmp_path / "plan", 2, model=model, steps=3, **training)
    run = run_plan(folder, 2)
    losses = [step["loss"] for step in metrics(run, "step")]
    assert losses[0] == pytest.approx(math.log(256), rel=0.1)
    (evaluation,) = metrics(run, "evaluation")
    assert evaluation["samples"] == 39
    assert evaluation["loss"] < losses[0]
    for rank in range(2):
        memory = read_memory(run, rank)
        assert memory is not None
        assert memory.entries_bytes["micro-batches"] == 2 * 4 * 27 * 8
        assert abs(memory.entries_bytes["other"]) < 2**16


def test_a_killed_launcher_fails_the_launch_and_leaves_nothing_behind(tmp_path: Path) -> None:
    """Kills DeepSpeed's launcher, a child of ours; test_kills.py kills ranks."""
    folder = write_plan(tmp_path / "plan", 2, steps=100_000)
    run = folder / "runs" / "001"
    command = [sys.executable, "-m", "translution.cli", "launch", str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        wait_until(lambda: stepping(run), process=process)
        statuses = [read_status(run, rank) for rank in (0, 1)]
        pids = [status.pid for status in statuses if status is not None]
        assert len(pids) == 2
        parent = int(Path(f"/proc/{pids[1]}/stat").read_text().rsplit(")", 1)[1].split()[1])
        os.kill(parent, signal.SIGKILL)
        _, errors = process.communicate(timeout=PATIENCE_S)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 1
    assert errors.count("\n") == 1
    # Ranks that outlive their launcher are asked to save and end.
    assert "translution: error: stopped by SIGTERM; saved" in errors
    assert not any(process_is_alive(pid) for pid in pids)


# Ctrl-C and SIGKILL to the launch are in the fault table (tests/benchmarks/test_faults.py), SIGUSR1 in test_slurm.py.
def test_ranks_without_a_launcher_watch_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As under Slurm and torchrun: the rank before one that is stopped ends, and says which one and where."""
    monkeypatch.setenv(HANG_MINUTES, "0.05")
    folder = write_plan(tmp_path / "plan", 2, steps=100_000)
    run, stopped = folder / "runs" / "by-hand", list[int]()

    def stop() -> None:
        wait_until(lambda: stepping(run))
        place = read_progress(run, 1)
        assert place is not None
        stopped.append(place.pid)
        os.kill(place.pid, signal.SIGSTOP)

    thread = threading.Thread(target=stop)
    thread.start()
    with pytest.raises(AssertionError):
        run_plan(folder, 2)
    thread.join()
    with pytest.raises(RunFailedError, match=r"^rank 1 was stopped by a signal \d+ s ago, at step \d+, in .*stacks: "):
        raise_unless_finished(run, 2, exit_code=1)
    assert not process_is_alive(stopped[0])


def test_the_printed_command_runs_a_plan_by_itself(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Every process tells what it imports: the launcher here, the rank in its log from its start on.
    monkeypatch.setenv("PYTHONPROFILEIMPORTTIME", "1")
    folder = write_plan(tmp_path / "plan", 1, steps=3)
    assert run_cli(["launch", str(folder), "--dry-run"]) == 0
    command = capsys.readouterr().out.strip().replace("29500", str(free_port()))
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 0, done.stderr[-5000:]
    run = folder / "runs" / "001"
    raise_unless_finished(run, 1, exit_code=0)
    imported = set(re.findall(r"\| +(\S+)$", done.stderr + log_path(run, 0).read_text(), re.MULTILINE))
    # It would take a second and 150 MB of every rank, and nothing is compiled.
    assert imported >= {"torch.optim", "deepspeed.runtime.zero.stage3"}
    assert "torch._dynamo" not in imported
    assert run_cli(["verify", str(folder)]) == 0


@pytest.mark.parametrize(
    ("text", "accuracy"),
    [('{"event": "evaluation", "accuracy": 0.5}\n{"event": "st', 0.5), ("", None), (None, None)],
    ids=["torn", "empty", "missing"],
)
def test_verify_reads_the_files_of_a_killed_run(
    tmp_path: Path, text: str | None, accuracy: float | None, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_plan(tmp_path / "plan", 1)
    run = folder / "runs" / "001"
    make_run_folders(run, folder)
    assert run_cli(["verify", str(folder)]) == 2
    assert "holds no measurement" in capsys.readouterr().err
    measurement = {
        "rank": 0, "device": "cpu", "step": 2, "entries_bytes": {"parameters": 5}, "resident_bytes": 5,
        "phase_peak_bytes": {"forward": 7, "optimizer step": 6}, "peak_bytes": 7, "process_peak_bytes": 9,
    }  # fmt: skip
    memory_path(run, 0).write_text(json.dumps(measurement))
    if text is not None:
        (run / METRICS).write_text(text)
    assert run_cli(["verify", str(folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["accuracy"] == accuracy


def assert_names_a_layer(message: str, text: str) -> None:
    named = re.search(f"FloatingPointError: {message}", text)
    assert named is not None, text
    network = build(parse_model_spec(TINY))
    assert named[1] in {name for name, _ in (*network.named_modules(), *network.named_parameters())}


def diverging_plan(folder: Path, learning_rate: float) -> Path:
    return write_plan(folder, 1, learning_rate=learning_rate, gradient_clipping=0.0, steps=30)


def test_a_diverged_run_stops_and_names_its_step_and_layer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = diverging_plan(tmp_path / "plan", 1e30)
    assert run_cli(["launch", str(folder)]) == 1
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1
    assert_names_a_layer(r"step 2: loss is nan: first not finite: (\S+) \(output\)", errors)


def test_gradients_that_are_not_finite_stop_a_run_whose_loss_is(tmp_path: Path) -> None:
    folder = diverging_plan(tmp_path / "plan", 1e5)
    with pytest.raises(AssertionError, match="FloatingPointError"):
        run_plan(folder, 1)
    with pytest.raises(RunFailedError) as error:
        raise_unless_finished(folder / "runs" / "by-hand", 1, exit_code=1)
    where = r"first not finite, from the loss backwards: (\S+) "
    assert_names_a_layer(f"step 2: the norm of the gradients is not finite: {where}", str(error.value))


def test_ranks_stop_together_when_one_of_them_is_not_finite(tmp_path: Path, root: Path) -> None:
    folder = write_plan(tmp_path / "plan", 2, gradient_accumulation_steps=2)
    make_run_folders(tmp_path / "run", folder)
    out = tmp_path / "message"
    run_ranks_of([root / "tests" / "programs" / "poison.py", folder, tmp_path / "run", out], 2, tmp_path / "log")
    messages = [out.with_suffix(f".{rank}").read_text() for rank in (0, 1)]
    assert messages == ["step 2: loss is nan: first not finite: network (input), on rank 1"] * 2
