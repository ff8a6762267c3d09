"""`translution plan` with a hundred bad inputs: each is a one-line error and writes nothing."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from helpers.chance import repeats, seed

from translution.cli.main import run

OPTIONS: dict[str, list[str]] = {
    "--cluster": ["", "8x", "x8xH100", "8xH1000", "cpu:0", "cpu:-1", "cpu:99999", "0x8xH100", "8xH100x", "a.yaml",
                  "dgx", "\x00", "٣xH100", "8×H100"],
    "--precision": ["fp8", "", "BF16", "float", "32"],
    "--global-batch": ["0", "-8", "7", "1e9", "x", "9" * 30],
    "--micro-batch": ["0", "-1", "3", "2.5", "many"],
    "--accumulation": ["0", "-4", "5", "nan"],
    "--steps": ["0", "-1", "ten", "1.5"],
    "--epochs": ["nan", "-1", "0"],
    "--samples": ["0", "-7", "x"],
    "--stage": ["4", "-1", "three"],
    "--tile-relations": ["0", "-3", "100000", "x"],
    "--offload": ["gpu", "", "CPU", "nvme ", "disk"],
    "--offload-ratio": ["0", "1.5", "-0.1", "nan", "half"],
    "--checkpointing": ["all", "", "Block"],
    "--minimize": ["speed", "", "Time"],
    "--headroom": ["1", "-0.1", "nan", "inf", "x"],
    "--learning-rate": ["0", "-1", "nan", "inf"],
    "--data": ["imagenet", ""],
    "--operator": ["conv", "Translution", ""],
    "--roles": ["qq", "", "x", "qkvo"],
    "--c1": ["0", "-1", "x"],
    "--layers": ["first:0", "first:99", "some", "every:x"],
    "--set": ["dim", "=3", "dim=0", "dim=-2", "dim=3.5", "depth=[]", "nothing=1", "image=7", "name=", "heads=5"],
    "--train": ["optimizer=adam", "betas=1", "micro=2", "momentum=2", "bf16_states=true", "steps=-1"],
    "--zero": ["stage=7", "bucket=1", "sub_group_elements=0", "offload_optimizer.device=disk", "x.y=1"],
}  # fmt: skip
MODELS = ["", "vit", "vit-huge/16", "vit-base/15", "gpt-base/0", "nothing.yaml", "vit-base/16/4", "../x", "9" * 3000]
CASES = 100


def cases() -> list[list[str]]:
    """Return pairs of an option and a bad value, each at most once."""
    chooser = random.Random(seed(20261125))
    wrong = [[option, value] for option, values in OPTIONS.items() for value in values]
    wrong += [["MODEL", model] for model in MODELS]
    chooser.shuffle(wrong)
    return wrong[: repeats(CASES)]


@pytest.mark.fuzz
@pytest.mark.parametrize("wrong", cases(), ids=lambda wrong: f"{wrong[0]}-{wrong[1][:12]!r}")
def test_a_bad_value_is_a_one_line_error(wrong: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    option, value = wrong
    right = {"--cluster": "8xH100", "--precision": "bf16", "--data": "synthetic", "--out": str(tmp_path / "plan")}
    if option == "--epochs":
        right["--samples"] = "1000"
    if option == "--offload-ratio":
        right["--offload"] = "cpu-optimizer"
    if option in ("--micro-batch", "--accumulation"):
        right["--global-batch"] = "64"
    model = value if option == "MODEL" else "vit-tiny/56"
    if option != "MODEL":
        right[option] = value
    arguments = ["plan", model, *(word for pair in right.items() for word in pair)]
    assert run(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("translution: error: ")
    assert captured.err.count("\n") == 1
    assert len(captured.err) < 1000
    assert "Traceback" not in captured.err
    assert list(tmp_path.iterdir()) == []


def test_there_are_a_hundred_cases() -> None:
    assert len({tuple(case) for case in cases()}) == CASES
