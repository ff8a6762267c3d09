"""The Slurm job of a plan, on a real Slurm of two nodes."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.cluster.real_slurm import missing, path, real_slurm
from helpers.runs import write_plan
from helpers.waiting import wait_until

from translution.distributed.checkpoint.manifest import newest_checkpoint
from translution.distributed.runs.folder import CHECKPOINT, METRICS
from translution.distributed.runs.status import read_statuses

pytestmark = pytest.mark.skipif(bool(missing()), reason=f"needs {missing()}")


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    with real_slurm(tmp_path_factory.mktemp("slurm")) as environment:
        yield environment | {"PATH": f"{Path(sys.executable).parent}:{path()}"}


def submit(folder: Path, environment: dict[str, str], *words: str) -> tuple[int, str]:
    """Submit the job, wait for its end, and return its exit code and log."""
    job = ask(["sbatch", "--parsable", *words], folder, environment).strip()

    def ended() -> str:
        text = ask(["scontrol", "--oneliner", "show", "job", job], folder, environment)
        return text if re.search(r"JobState=(COMPLETED|FAILED|TIMEOUT|CANCELLED)", text) else ""

    # sbatch --wait polls only every ten seconds.
    text = wait_until(ended, every_s=0.3)
    match = re.search(r" ExitCode=(\d+):", text)
    assert match is not None
    return int(match[1]), (folder / f"slurm-{job}.log").read_text()


def ask(command: list[str], folder: Path, environment: dict[str, str]) -> str:
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=True).stdout


def steps(run: Path) -> list[int]:
    lines = [json.loads(line) for line in (run / METRICS).read_text().splitlines()]
    return [line["step"] for line in lines if line["event"] == "step"]


def test_a_job_saves_before_its_limit_and_resumes_when_submitted_again(slurm: dict[str, str], tmp_path: Path) -> None:
    folder = write_plan(tmp_path / "a plan", 1, nodes=2, steps=100_000)
    run = folder / "runs" / "own"
    # Slurm checks limits, in whole minutes, twice a minute: the signal comes after 15 to 45 seconds.
    code, log = submit(folder, slurm, "--time=1", "--signal=USR1@45", "job.sbatch", str(run))
    assert code == 1, log
    assert "ok      n2: host memory" in log
    assert "versions on 2 nodes: python" in log
    saved = newest_checkpoint(run / CHECKPOINT)
    assert saved is not None, log
    last = saved.manifest.step
    for rank in (0, 1):
        assert f"rank {rank}: stopped at step {last}," in log
        assert f"rank {rank} prints to {run}/logs/rank_{rank}.log" in log
    assert steps(run)[-1] == last

    write_plan(folder, 1, nodes=2, steps=last + 2, force=True)
    code, log = submit(folder, slurm, "job.sbatch", str(run))
    assert code == 0, log
    assert [status.state for status in read_statuses(run)] == ["finished", "finished"]
    assert steps(run)[-2:] == [last + 1, last + 2]
    assert not list(folder.glob(".preflight*"))


def test_a_job_does_not_start_if_a_node_fails_its_checks(slurm: dict[str, str], tmp_path: Path) -> None:
    nvme = tmp_path / "nvme"
    nvme.mkdir()
    folder = write_plan(tmp_path / "plan", 1, nodes=2, offload="nvme-optimizer", nvme_path=nvme)
    nvme.rmdir()
    code, log = submit(folder, slurm, "job.sbatch")
    assert code == 1
    assert f"FAILED  n1: NVMe folder {nvme}: is not a folder: create it" in log
    assert f"FAILED  n2: NVMe folder {nvme}: is not a folder: create it" in log
    assert not (folder / "runs").exists()
