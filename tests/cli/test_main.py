"""The command line in general: help, version, one-line errors, exit codes, and lazy imports."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from translution.cli import commands
from translution.cli.main import MODULES, PANELS, full_app, run
from translution.planner.common.machine import usable_cores

Captured = pytest.CaptureFixture[str]


def test_help_shows_examples(capsys: Captured) -> None:
    for command in ("estimate", "plan", "clusters", "launch", "rehearse", "verify", "export"):
        assert run([command, "--help"]) == 0
        assert f"translution {command}" in " ".join(capsys.readouterr().out.split())


def test_the_version_is_the_distribution_version(capsys: Captured) -> None:
    assert run(["--version"]) == 0
    assert capsys.readouterr().out.startswith("translution-scale ")


def test_the_overview_shows_every_command_in_its_panel(capsys: Captured) -> None:
    shown = []
    for words in ([], ["-h"], ["--help"]):
        assert run(words) == 0
        shown.append(capsys.readouterr().out)
    assert len(set(shown)) == 1
    hidden = {name for name, module in MODULES.items() if module == "training.ranks"}
    assert {name for lines in PANELS.values() for name in lines} == set(MODULES) - hidden
    place = 0
    for panel, lines in PANELS.items():
        place = shown[0].index(f"─ {panel} ─", place)
        for name, text in lines.items():
            place = shown[0].index(f"│ {name} ", place)
            assert shown[0][place:].split("\n")[0].endswith("│")
            assert text in shown[0][place:].split("\n")[0], "one line of 80 columns"
    assert not any(f"│ {name} " in shown[0] for name in hidden)


def test_options_are_in_panels(capsys: Captured) -> None:
    assert run(["plan", "-h"]) == 0
    panels = capsys.readouterr().out
    for panel in ("Model", "Batch", "Training", "ZeRO, tiles and offload", "What is searched for", "Output"):
        assert f"─ {panel} ─" in panels


def test_the_command_line_is_a_module_too(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "translution", "--version"], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert done.stdout.startswith("translution-scale ")


def test_help_and_version_import_nothing_heavy() -> None:
    program = (
        "import sys\nfrom translution.cli.main import run\nassert run([{word!r}]) == 0\n"
        "print(*{{'torch', 'numpy', 'pandas', 'deepspeed'}} & set(sys.modules), file=sys.stderr)"
    )
    for word in ("--help", "--version"):
        words = [sys.executable, "-c", program.format(word=word)]
        done = subprocess.run(words, capture_output=True, text=True, check=True)
        assert done.stderr.strip() == ""


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
    (r"argument: 'a\nb' is not allowed: must be one line", ["launch", "EXISTING", "--run", "a\nb"], 2),
    (r"argument: 'x\x1b[2J' is not allowed: must be one line", ["estimate", "x\x1b[2J"], 2),
    (r"name: 'a\nb' is not allowed: must be one line", ["estimate", "vit-base/16", "--set", r'name="a\nb"'], 2),
    ("is not a run folder", ["verify", "EXISTING"], 2),
]


@pytest.mark.parametrize(
    ("message", "arguments", "code"), BAD, ids=[f"{number}-{entry[0][:30]}" for number, entry in enumerate(BAD)]
)
def test_bad_input_is_a_one_line_error_and_writes_nothing(
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
    assert captured.err[:-1].isprintable()
    assert message in captured.err
    assert [path.name for path in tmp_path.rglob("*")] == ["existing"]


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["estimate", "vit-bse/16"], 2),
        (["estimate", "vit-base/16", "--opertor", "alpha"], 2),
        (["launch", "MISSING"], 2),
        (["plan", "vit-base/16", "--cluster", "8xH100", "--force"], 2),
    ],
)
def test_errors_are_json_with_json(words: list[str], code: int, tmp_path: Path, capsys: Captured) -> None:
    words = [str(tmp_path / "missing") if word == "MISSING" else word for word in words]
    assert run(words) == code
    text = capsys.readouterr().err.removeprefix("translution: error: ").removesuffix("\n")
    assert run([*words, "--json"]) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert json.loads(captured.err) == {"error": text, "exit_code": code}


def test_every_module_of_a_command_has_its_commands(capsys: Captured) -> None:
    program = typer.main.get_command(full_app())
    assert list(program.commands) == list(MODULES)
    folder = Path(commands.__file__).parent
    modules = {f"{path.parent.name}.{path.stem}" for path in folder.glob("*/*.py") if path.stem != "__init__"}
    assert modules == set(MODULES.values())
    assert all(
        MODULES[name].removesuffix("_").endswith(f".{name.replace('-', '_')}")
        for name, command in program.commands.items()
        if not command.hidden
    )


def test_a_command_imports_no_other_command() -> None:
    program = (
        "import sys\nfrom translution.cli.main import run\nassert run(['clusters']) == 0\n"
        "print(*sorted(name for name in sys.modules if name.startswith('translution.cli.commands.')), file=sys.stderr)"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stderr.split() == ["translution.cli.commands.planning", "translution.cli.commands.planning.clusters"]


def test_an_unknown_key_of_training_is_an_error_with_the_nearest_name(capsys: Captured) -> None:
    words = ["plan", "vit-tiny/56", "--cluster", "8xH100", "--out", "x"]
    assert run([*words, "--train", "sampels=3"]) == 2
    assert "--train: unknown key 'sampels'" in capsys.readouterr().err
    assert run([*words, "--train", "samples=3"]) == 2
    assert "--train: unknown key 'samples'" in capsys.readouterr().err
    assert run(["estimate", "vit-tiny/56", "--set", "source=3"]) == 2
    assert "unknown key 'source'" in capsys.readouterr().err
