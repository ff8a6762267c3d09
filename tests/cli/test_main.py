"""The command line: results on stdout, one line per error on stderr, exit codes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from translution.cli.main import run
from translution.distributed.remote.rank_command import decode
from translution.planner.common.machine import usable_cores
from translution.planner.config.model import OPERATORS

Captured = pytest.CaptureFixture[str]


def test_json_gives_the_exact_count_and_nothing_else(capsys: Captured) -> None:
    assert run(["estimate", "vit-base/16", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["parameters"]["total"] == 15_608_200_168
    by_operator = {entry["operator"]: entry["parameters"]["total"] for entry in document["comparison"]}
    # Attention has 197·768 positions; instead of them a scalar has 732·12·12 entries, two vectors
    # have 2·732·64·12, and absolute matrices are 197 times 12·3·768² parameters.
    assert by_operator == {
        "translution": 15_608_200_168,
        "alpha": 1_064_909_800,
        "attention": 86_543_080,
        "bias": 86_497_192,
        "shaw": 87_516_136,
        "absolute": 4_248_189_928,
    }
    assert [stage["stage"] for stage in document["per_rank"]["zero"]] == [0, 1, 2, 3]
    assert isinstance(document["activations_bytes"]["published"], int)


def test_flags_change_the_model(capsys: Captured) -> None:
    arguments = ["--operator", "alpha", "--roles", "kv", "--c1", "16", "--c2", "16", "--json"]
    assert run(["estimate", "gpt-tiny/160", *arguments]) == 0
    assert json.loads(capsys.readouterr().out)["parameters"]["total"] == 26_610_048
    assert run(["estimate", "vit-tiny/56", "--relative-layers", "first:2", "--set", "depth=4", "--json"]) == 0
    model = json.loads(capsys.readouterr().out)["model"]
    assert (model["depth"], model["relative_layers"]) == (4, "first:2")


def test_the_table_compares_the_three_operators(capsys: Captured) -> None:
    assert run(["estimate", "vit-base/16"]) == 0
    out = capsys.readouterr().out
    for text in ("full Translution", "α-Translution", "attention", "15.61 G", "15,608,200,168", "ZeRO-3"):
        assert text in out


def test_the_papers_vit_b_is_explained(capsys: Captured) -> None:
    assert run(["estimate", "ViT-B/16"]) == 0
    assert "paper's name for vit-mini/16; for ViT-Base write vit-base/16" in capsys.readouterr().err


def test_help_teaches_by_example(capsys: Captured) -> None:
    for command in ("estimate", "plan", "clusters", "launch", "rehearse", "verify", "export"):
        assert run([command, "--help"]) == 0
        assert f"translution {command}" in " ".join(capsys.readouterr().out.split())


BAD: list[tuple[str, list[str], int]] = [
    ("model: 'vit-bse/16' is not allowed", ["estimate", "vit-bse/16"], 2),
    ("patch: 15 is not allowed", ["estimate", "vit-base/15"], 2),
    ("heads: 7 is not allowed", ["estimate", "vit-base/16", "--set", "heads=7"], 2),
    ("unknown key 'hats'", ["estimate", "vit-base/16", "--set", "hats=7"], 2),
    ("must be FIELD=VALUE", ["estimate", "vit-base/16", "--set", "heads"], 2),
    ("c1: 0 is not allowed", ["estimate", "vit-base/16", "--operator", "alpha", "--c1", "0"], 2),
    ("operator: 'conv'", ["estimate", "vit-base/16", "--operator", "conv"], 2),
    ("precision: 'fp8'", ["estimate", "vit-base/16", "--precision", "fp8"], 2),
    ("micro_batch: 0", ["estimate", "vit-base/16", "--micro-batch", "0"], 2),
    ("must follow the =", ["estimate", "vit-base/16", "--set", "depth="], 2),
    ("family: ['vit']", ["estimate", "vit-base/16", "--set", "family=[vit]"], 2),
    ("not valid YAML", ["estimate", "vit-base/16", "--set", "name=2020-13-45"], 2),
    ("not valid YAML", ["estimate", "vit-base/16", "--set", "name=" + "[" * 5000], 2),
    ("is not allowed", ["estimate", "vit-base/16", "--set", "depth=1000000000"], 2),
    ("is not allowed", ["estimate", "vit-base/16", "--set", "image=10000000000"], 2),
    ("is not allowed", ["estimate", "gpt-base/" + "9" * 5000], 2),
    ("is not allowed", ["estimate", "x" * 5000], 2),
    ("cannot be read", ["estimate", "x" * 5000 + ".yaml"], 2),
    ("cluster: 'cpu:99", ["plan", "MODEL", "--cluster", "cpu:" + "9" * 5000, "--out", "OUT"], 2),
    ("cannot be written", ["plan", "MODEL", "--cluster", "cpu:1", "--out", "x" * 5000], 2),
    ("did you mean 'H100'", ["plan", "MODEL", "--cluster", "8xH10", "--out", "OUT"], 2),
    ("did you mean 'dgx-h100'", ["plan", "MODEL", "--cluster", "2xdgx-h10", "--out", "OUT"], 2),
    ("No such option", ["estimate", "vit-base/16", "--opertor", "alpha"], 2),
    ("No such command", ["estmate", "vit-base/16"], 2),
    ("Missing argument 'MODEL'", ["estimate"], 2),
    ("ranks must be from 1 to", ["plan", "MODEL", "--cluster", f"cpu:{usable_cores() + 1}", "--out", "OUT"], 2),
    ("exists already", ["plan", "MODEL", "--cluster", "cpu:1", "--out", "EXISTING"], 2),
    ("steps: 0 is not allowed", ["plan", "MODEL", "--cluster", "cpu:1", "--out", "OUT", "--steps", "0"], 2),
    (
        "warmup_steps: 5",
        ["plan", "MODEL", "--cluster", "cpu:1", "--out", "OUT", "--steps", "5", "--warmup-steps", "5"],
        2,
    ),
    ("learning_rate", ["plan", "MODEL", "--cluster", "cpu:1", "--out", "OUT", "--learning-rate", "-1"], 2),
    ("data: 'digts'", ["plan", "MODEL", "--cluster", "cpu:1", "--out", "OUT", "--data", "digts"], 2),
    ("minimize: 'speed'", ["plan", "MODEL", "--cluster", "cpu:1", "--out", "OUT", "--minimize", "speed"], 2),
    ("global_batch: 7", ["plan", "vit-tiny/56", "--cluster", "8xH100", "--out", "OUT", "--global-batch", "7"], 2),
    ("offload: 'gpu'", ["plan", "MODEL", "--cluster", "cpu:1", "--out", "OUT", "--offload", "gpu"], 2),
    ("headroom: 1.5", ["plan", "MODEL", "--cluster", "cpu:1", "--out", "OUT", "--headroom", "1.5"], 2),
    ("samples: -3", ["plan", "MODEL", "--cluster", "cpu:1", "--out", "OUT", "--samples", "-3"], 2),
    ("checkpointing: 'some'", ["plan", "MODEL", "--cluster", "cpu:1", "--out", "OUT", "--checkpointing", "some"], 2),
    ("must end in .yaml", ["calibrate", "--cluster", "cpu:1", "--out", "OUT"], 2),
    ("must end in .md", ["compare", "vit-tiny/56", "--out", "OUT"], 2),
    ("did you mean 'H100'", ["compare", "vit-tiny/56", "--gpu", "H10"], 2),
    ("is not a plan folder", ["launch", "EXISTING"], 2),
    ("is not a run folder", ["verify", "EXISTING"], 2),
]


@pytest.mark.parametrize(
    ("message", "arguments", "code"), BAD, ids=[f"{number}-{entry[0][:30]}" for number, entry in enumerate(BAD)]
)
def test_bad_input_is_one_line_and_writes_nothing(
    message: str, arguments: list[str], code: int, tmp_path: Path, root: Path, capsys: Captured
) -> None:
    (tmp_path / "existing").mkdir()
    places = {
        "MODEL": str(root / "examples" / "digits.yaml"),
        "OUT": str(tmp_path / "out"),
        "EXISTING": str(tmp_path / "existing"),
    }
    assert run([places.get(argument, argument) for argument in arguments]) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("translution: error: ")
    assert captured.err.count("\n") == 1
    assert message in captured.err
    assert [path.name for path in tmp_path.rglob("*")] == ["existing"]


def test_plan_writes_a_folder_and_dry_run_shows_the_command(tmp_path: Path, root: Path, capsys: Captured) -> None:
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


@pytest.mark.parametrize("operator", ["attention", "alpha"])
def test_a_model_that_translution_does_not_allow_is_estimated(operator: str, capsys: Captured) -> None:
    assert run(["estimate", "vit-base/16", "--operator", operator, "--set", "rotary=true", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert {entry["operator"] for entry in document["comparison"]} == set(OPERATORS)


def test_names_are_printed_as_they_are(tmp_path: Path, root: Path, capsys: Captured) -> None:
    folder = tmp_path / "x[" / "y]"
    arguments = [str(root / "examples" / "digits.yaml"), "--cluster", "cpu:1", "--set", "name='[/bold]'"]
    assert run(["plan", *arguments, "--out", str(folder)]) == 0
    assert "[/bold]" in capsys.readouterr().out
    assert run(["estimate", "vit-tiny/56", "--set", "name='[/x]'"]) == 0
    assert "[/x]" in capsys.readouterr().out


def test_several_nodes_need_a_hostfile(tmp_path: Path, capsys: Captured) -> None:
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
    told = decode(captured.out.split()[-1])
    assert (told.plan_folder, told.run) == (tmp_path / "plan", tmp_path / "plan" / "runs" / "001")
    assert told.environment["OMP_NUM_THREADS"] == "14"
    assert not (tmp_path / "plan" / "runs").exists()


def test_clusters_are_listed_with_their_sources(capsys: Captured) -> None:
    assert run(["clusters"]) == 0
    out = capsys.readouterr().out
    for text in ("RTX4090", "dgx-h100", "nd-mi300x-v5", "nvidia-tensor-core-gpu-datasheet", "estimate, not measured"):
        assert text in out
    assert run(["clusters", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    figure = document["gpus"]["H100"]["memory_bytes_per_s"]
    assert (figure["value"], document["sources"][figure["source"]]["title"][:11]) == (3.35e12, "NVIDIA H100")
    assert document["nodes"]["dgx-h100"]["host_cores"] == {"value": 112, "source": "dgx-h100"}
    assert document["gpu_constants"]["H100"]["entries"][0]["name"] == "driver_reserve"


def test_the_version_is_the_distributions(capsys: Captured) -> None:
    assert run(["--version"]) == 0
    assert capsys.readouterr().out.startswith("translution-scale ")
