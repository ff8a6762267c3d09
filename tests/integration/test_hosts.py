"""Launch across two real hosts, each with its own network address and ssh server."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.cluster.real_hosts import ADDRESSES, SSH_PORT, Hosts, missing, real_hosts
from helpers.runs import write_plan
from helpers.waiting import PATIENCE_S, wait_until

from translution.distributed.checkpoint.manifest import newest_checkpoint
from translution.distributed.preflight.checks import Check
from translution.distributed.preflight.node_report import NodeReport, compare_nodes
from translution.distributed.remote.hostfile import read_hostfile
from translution.distributed.remote.rank_command import (
    RankCommand,
    forwarded_variables,
    hand_over_secrets,
    make_rank_command,
    read_secrets,
    runner_environment,
)
from translution.distributed.runs import heartbeat
from translution.distributed.runs.folder import CHECKPOINT, METRICS
from translution.distributed.runs.heartbeat import (
    FOLLOW_HEARTBEAT,
    HEARTBEAT,
    control_path,
    keep_heartbeat,
    read_heartbeat,
    require_heartbeat,
)
from translution.distributed.runs.mode import RunMode
from translution.distributed.runs.status import read_statuses
from translution.distributed.runs.watchdog import process_is_alive
from translution.planner.common.errors import InputError
from translution.planner.hardware.cluster import local_cpu_cluster

SECRETS = {"HF_TOKEN": "hf_1234567890abcdefghij", "WANDB_API_KEY": "0123456789abcdef0123456789abcdef"}
CLI = [sys.executable, "-m", "translution.cli"]
needs_hosts = pytest.mark.skipif(bool(missing()), reason=f"needs {missing()}")


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    with real_hosts(tmp_path_factory.mktemp("hosts")) as made:
        yield made


def launch(hosts: Hosts, plan: Path, *options: object, host: int = 0) -> subprocess.Popen[str]:
    command = hosts.command(*CLI, "launch", plan, "--hostfile", hosts.hostfile, *options, host=host)
    return subprocess.Popen(
        command, env=hosts.environment | SECRETS, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def events(run: Path, event: str) -> list[int]:
    lines = [json.loads(line) for line in (run / METRICS).read_text().splitlines()]
    return [line["step"] for line in lines if line["event"] == event]


def wait_for_steps(run: Path, process: subprocess.Popen[str]) -> list[int]:
    """Wait until the ranks train, and return their process ids."""
    wait_until(lambda: (run / METRICS).exists() and events(run, "step"), process=process)
    return [status.pid for status in read_statuses(run)]


def command_lines() -> list[bytes]:
    """Command lines of all processes, which every user of a machine sees."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            found.append(path.read_bytes())
    return found


def shows(text: bytes, secret: str) -> bool:
    """Return True if a text holds a secret, as it is or within base64."""
    words = re.findall(rb"[\w-]{40,}", text)
    return any(secret.encode() in part for part in (text, *map(decoded, words)))


def decoded(word: bytes) -> bytes:
    with contextlib.suppress(ValueError):
        return base64.urlsafe_b64decode(word + b"=" * (-len(word) % 4))
    return b""


@needs_hosts
def test_a_launch_trains_on_two_hosts_is_stopped_and_resumes(hosts: Hosts, tmp_path: Path) -> None:
    # A shell that evaluates this name would create files, and pdsh would insert the host name.
    folder = tmp_path / "a plan; touch owned $(touch owned) `touch owned` %h ' \" %n"
    write_plan(folder, 1, nodes=2, steps=100_000)
    run = folder / "runs" / "001"
    ssh = ("--ssh-port", SSH_PORT)
    process = launch(hosts, folder, *ssh)
    pids = wait_for_steps(run, process)
    assert len(pids) == 2
    assert read_secrets(run) == SECRETS
    assert not [line for line in command_lines() for value in SECRETS.values() if shows(line, value)]
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 130, errors
    assert errors.startswith("translution: error: interrupted; saved at step ")
    assert errors.count("\n") == 1
    saved = newest_checkpoint(run / CHECKPOINT)
    assert saved is not None
    assert not control_path(run, HEARTBEAT).exists()
    wait_until(lambda: not any(map(process_is_alive, pids)))

    last = saved.manifest.step + 2
    write_plan(folder, 1, nodes=2, steps=last, force=True)
    process = launch(hosts, folder, "--resume", *ssh)
    printed, errors = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, errors
    assert f"starting 2 ranks on {', '.join(ADDRESSES)}" in " ".join(printed.split())
    assert events(run, "step")[-3:] == [last - 2, last - 1, last]
    assert events(run, "evaluation") == [last]
    log = (run / "launcher.log").read_text()
    for rank, address in enumerate(ADDRESSES):
        assert f"{address}: rank {rank} prints to {run}/logs/rank_{rank}.log" in log
    assert not list(tmp_path.rglob("owned"))
    assert not Path("/owned").exists()
    for path in run.rglob("*"):
        if path.is_file():
            assert not [path for value in SECRETS.values() if shows(path.read_bytes(), value)]


@needs_hosts
def test_a_rank_of_another_host_that_hangs_is_continued_and_the_run_is_saved(hosts: Hosts, tmp_path: Path) -> None:
    folder = write_plan(tmp_path / "plan", 1, nodes=2, steps=100_000)
    run = folder / "runs" / "001"
    process = launch(hosts, folder, "--ssh-port", SSH_PORT, "--hang-minutes", 0.05)
    pids = wait_for_steps(run, process)
    os.kill(pids[1], signal.SIGSTOP)
    printed, errors = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 1
    assert re.match(r"translution: error: rank 1 was stopped by a signal \d+ s ago, at step \d+, in ", errors)
    saved = newest_checkpoint(run / CHECKPOINT)
    assert saved is not None
    assert f"; saved at step {saved.manifest.step}: resume it with " in errors
    assert "the ranks are asked to save and end" in printed
    # Both were asked for their stacks.
    assert "Current thread" in (run / "logs" / "rank_0.log").read_text()
    wait_until(lambda: not any(map(process_is_alive, pids)))


@needs_hosts
def test_every_node_starts_its_own_ranks_without_ssh(hosts: Hosts, tmp_path: Path) -> None:
    folder = write_plan(tmp_path / "plan", 1, nodes=2, steps=2)
    options = ("--no-ssh", "--run", folder / "runs" / "own", "--node-rank")
    processes = [launch(hosts, folder, *options, node, host=node) for node in (0, 1)]
    for process in processes:
        _, errors = process.communicate(timeout=PATIENCE_S)
        assert process.returncode == 0, errors
    assert [status.state for status in read_statuses(folder / "runs" / "own")] == ["finished", "finished"]


@needs_hosts
def test_preflight_checks_every_host(hosts: Hosts, tmp_path: Path) -> None:
    folder = write_plan(tmp_path / "plan", 1, nodes=2, steps=2)
    options = ["--hostfile", hosts.hostfile, "--ssh-port", SSH_PORT]
    command = hosts.command(*CLI, "preflight", folder, *options)
    done = subprocess.run(command, env=hosts.environment, capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 0, done.stderr
    for address in ADDRESSES:
        assert f"ok      {address}: host memory: " in done.stdout
    assert "ok      versions on 2 nodes: python" in done.stdout


@needs_hosts
def test_a_problem_of_a_host_is_reported_in_one_line(hosts: Hosts, tmp_path: Path) -> None:
    folder = write_plan(tmp_path / "plan", 1, nodes=2, steps=2)
    wrong = tmp_path / "wrong"
    wrong.write_text(f"{ADDRESSES[0]} slots=1\n10.213.77.9 slots=1\n")
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "ssh").symlink_to("/usr/bin/ssh")
    for options, environment, expected in (
        (["--hostfile", wrong, "--ssh-port", SSH_PORT], {}, "host 10.213.77.9: cannot be reached through ssh: ssh: "),
        (["--ssh-port", 2223], {}, f"host {ADDRESSES[0]}: cannot be reached through ssh: ssh: connect to host"),
        (["--ssh-port", SSH_PORT], {"PATH": str(empty)}, "pdsh is missing: sudo apt-get install pdsh, or start"),
        (["--ssh-port", SSH_PORT, "--master-port", SSH_PORT], {}, f"{ADDRESSES[0]}: port {SSH_PORT}: cannot be opened"),
        (["--ssh-port", SSH_PORT, "--master-addr", "10.213.77.9"], {}, "of 10.213.77.9: cannot be reached"),
    ):
        command = [*CLI, "launch", folder, "--hostfile", hosts.hostfile, *options]
        ip = "/usr/sbin/ip" if Path("/usr/sbin/ip").exists() else "/sbin/ip"
        result = subprocess.run(
            [ip, *hosts.command(*command)[1:]],
            env=hosts.environment | environment,
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
        )
        assert result.returncode == 2, result
        assert result.stderr.count("\n") == 1
        assert expected in result.stderr
    assert not (folder / "runs").exists()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a slots=1\n", "1 hosts are not allowed: must be 2, the plan's nodes"),
        ("a slots=1\nb slots=2\n", ":2: slots=2 is not allowed: must be 1"),
        ("a slots=1\na slots=1\n", ":2: a is not allowed: must be listed only once"),
        ("a slots=1\n$(id) slots=1\n", "must be HOST slots=RANKS"),
        ("a slots=1\n-oProxyCommand=id slots=1\n", "must be HOST slots=RANKS"),
        ("a\nb\n", ":1: 'a' is not allowed: must be HOST slots=RANKS"),
        (None, "cannot be read: No such file"),
    ],
)
def test_a_hostfile_that_does_not_match_the_plan_is_rejected(tmp_path: Path, text: str | None, expected: str) -> None:
    path = tmp_path / "hosts"
    if text is not None:
        path.write_text(text)
    cluster = local_cpu_cluster(1).model_copy(update={"nodes": 2})
    with pytest.raises(InputError, match="hostfile: ") as error:
        read_hostfile(path, cluster)
    assert expected in str(error.value)
    path.write_text("# ours\nuser@a-1.b slots=1  # first\n\nb_2 slots=1\n")
    assert read_hostfile(path, cluster) == ["user@a-1.b", "b_2"]


def test_secrets_are_in_a_file_that_only_this_user_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = local_cpu_cluster(1)
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("HF_HOME", "/cache")
    command = make_rank_command(tmp_path, tmp_path, cluster, RunMode.TRAIN, follows=True)
    assert command.environment["HF_HOME"] == "/cache"
    assert not set(SECRETS) & set(command.environment)
    with hand_over_secrets(tmp_path, cluster):
        (path,) = (tmp_path / "control").iterdir()
        assert path.stat().st_mode & 0o777 == 0o600
        assert read_secrets(tmp_path) == SECRETS
    assert read_secrets(tmp_path) == {}
    assert shows(RankCommand(plan_folder=tmp_path, run=tmp_path, environment=SECRETS).to_payload().encode(), "hf_1234")


def test_the_command_of_a_rank_is_one_payload_that_no_shell_changes(tmp_path: Path) -> None:
    command = RankCommand(plan_folder=Path("/a b/$(id)"), run=Path("/'\"%h"), environment={"NCCL_DEBUG": "`id` ü"})
    payload = command.to_payload()
    assert RankCommand.from_payload(payload) == command
    assert payload.replace("-", "").replace("_", "").isalnum()
    for bad in (payload[:-3], "!", ""):
        with pytest.raises(InputError, match="rank command: "):
            RankCommand.from_payload(bad)
    environment = {"NCCL_SOCKET_IFNAME": "ib0", "HOME": "/root", "CUDA_VISIBLE_DEVICES": "1", "OMP_NUM_THREADS": "3"}
    assert forwarded_variables(local_cpu_cluster(1), environment) == {
        "DS_ACCELERATOR": "cpu", "NCCL_SOCKET_IFNAME": "ib0", "OMP_NUM_THREADS": "3", "THP_MEM_ALLOC_ENABLE": "1",
    }  # fmt: skip
    # DeepSpeed would put these in double quotes.
    assert runner_environment({"NCCL_X": "$(id)", "PYTHONPATH": "/a:/b", "PATH": "/bin"}) == {
        "PYTHONPATH": "/a:/b", "PATH": "/bin",
    }  # fmt: skip
    with pytest.raises(InputError, match=r"PYTHONPATH: .* pdsh carries only"):
        runner_environment({"PYTHONPATH": "/a b"})


FOLLOWER = """
import sys, time
from pathlib import Path
from translution.distributed.runs import heartbeat
from translution.distributed.system.signals import StopRequest
heartbeat.SILENT_SECONDS = float(sys.argv[2])
stop = StopRequest()
heartbeat.follow_heartbeat(Path(sys.argv[1]), 0, stop)
while stop.name is None:
    time.sleep(0.05)
print(stop.name, flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("end", ["ended", "silent"])
def test_a_rank_ends_when_its_launchers_heartbeat_stops(
    tmp_path: Path, end: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert read_heartbeat(tmp_path) is None
    require_heartbeat(tmp_path)  # This process does not follow a heartbeat.
    monkeypatch.setattr(heartbeat, "_HEARTBEAT_SECONDS", 0.2)
    command = [sys.executable, "-c", FOLLOWER, str(tmp_path), "3"]
    heard: set[str] = set()
    with keep_heartbeat(tmp_path):
        process = subprocess.Popen(command, env=os.environ | {FOLLOW_HEARTBEAT: "1"}, stdout=subprocess.PIPE, text=True)
        control_path(tmp_path, "stop").touch()
        assert process.stdout is not None
        assert process.stdout.readline() == "its launcher\n"
        # Longer than a heartbeat may be silent; this one is not.
        wait_until(lambda: heard.add(str(read_heartbeat(tmp_path))) or len(heard) > 20)
        assert process.poll() is None
    if end == "silent":
        # The state that a killed launcher leaves. The rank may have ended already.
        control_path(tmp_path, HEARTBEAT).write_text("7\n")
    assert process.wait(timeout=PATIENCE_S) == -signal.SIGKILL
    process.stdout.close()
    control_path(tmp_path, HEARTBEAT).unlink(missing_ok=True)
    monkeypatch.setenv(FOLLOW_HEARTBEAT, "1")
    with pytest.raises(InputError, match="the launcher's files are not visible from this node"):
        require_heartbeat(tmp_path)


def test_nodes_must_have_the_same_versions_and_plan() -> None:
    check = Check(name="host memory", passed=True, text="enough")
    one = NodeReport(host="a", checks=(check,), versions={"torch": "2.13", "nccl": "2.27"}, plan_digest="x")
    same = compare_nodes(["a", "b"], [one, one])
    assert [entry.passed for entry in same] == [True, True, True]
    assert same[-1].text == "torch 2.13, nccl 2.27"
    other = one.model_copy(update={"versions": {"torch": "2.12"}, "plan_digest": "y"})
    texts = [f"{entry.name}: {entry.text}" for entry in compare_nodes(["a", "b"], [one, other]) if not entry.passed]
    assert texts == [
        "b: torch: 2.12 is not allowed: must be 2.13, as on a: install the same there",
        "b: nccl: nothing is not allowed: must be 2.27, as on a: install the same there",
        "b: plan.json: differs from the plan on a: plan into a folder that all nodes share",
    ]
