"""`translution launch --dry-run`: the command on one machine and on several hosts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from translution.cli.main import run
from translution.distributed.remote.rank_command import RankCommand

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
    assert "deepspeed.launcher.launch --master_addr 127.0.0.1 --world_info=" in command
    assert "DS_ACCELERATOR=cpu" in command
    assert command.rstrip().endswith("runs/001")
    assert not (folder / "runs").exists()


def test_a_plan_for_several_nodes_needs_a_hostfile(tmp_path: Path, capsys: Captured) -> None:
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
