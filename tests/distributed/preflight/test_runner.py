"""`preflight --compile` compiles a plan's ops beforehand, here and on other hosts."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from helpers.fake_ops import FakeOps
from helpers.runs import TINY, without_version_notes, write_plan

from translution.cli.main import run
from translution.distributed.preflight.runner import compile_plan_ops
from translution.distributed.remote.target import LaunchTarget
from translution.distributed.system.compile_times import estimate_seconds, format_seconds
from translution.planner.common.errors import RunFailedError
from translution.planner.common.machine import usable_cores

Captured = pytest.CaptureFixture[str]
OFFLOADED = TINY | {"dim": 64, "heads": 4}


def ops_line(capsys: Captured) -> str:
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("ok      ops: ")]
    return line.removeprefix("ok      ops: ")


def estimate(*ops: str) -> str:
    return format_seconds(sum(estimate_seconds(op, usable_cores()) or 0 for op in ops))


def test_preflight_tells_what_is_not_compiled_yet(tmp_path: Path, fake_ops: FakeOps, capsys: Captured) -> None:
    folder = write_plan(tmp_path / "a plan", 1, model=OFFLOADED, offload="cpu-optimizer")
    assert run(["preflight", str(folder)]) == 0
    command = f"`translution preflight '{folder}' --compile`"
    into = f"into {fake_ops.extensions}"
    both = estimate("ShareMemCommBuilder", "CPUAdamBuilder")
    assert ops_line(capsys) == (
        f"ShareMemComm, CPUAdam are not compiled yet; {command} compiles them in about {both}, {into}"
    )
    plain = write_plan(tmp_path / "plain", 1)
    assert run(["preflight", str(plain)]) == 0
    one = estimate("ShareMemCommBuilder")
    assert (
        f"ShareMemComm is not compiled yet; `translution preflight {plain} --compile` compiles it in about {one}"
        in (ops_line(capsys))
    )
    fake_ops.library("CPUAdamBuilder").parent.mkdir()
    fake_ops.library("CPUAdamBuilder").touch()
    assert run(["preflight", str(folder)]) == 0
    assert ops_line(capsys).startswith(
        "ShareMemComm is not compiled yet, CPUAdam is compiled, but perhaps with other versions; "
    )
    assert run(["preflight", str(folder), "--compile"]) == 0
    capsys.readouterr()
    assert run(["preflight", str(folder)]) == 0
    assert ops_line(capsys) == f"ShareMemComm, CPUAdam are compiled, in {fake_ops.extensions}"


def test_compile_shows_progress_and_ends_with_0_or_names_the_op(
    tmp_path: Path, fake_ops: FakeOps, capsys: Captured
) -> None:
    folder = write_plan(tmp_path / "plan", 1, model=OFFLOADED, offload="cpu-optimizer")
    fake_ops.fail("CPUAdamBuilder")
    assert run(["preflight", str(folder), "--compile"]) == 1
    lines = without_version_notes(capsys.readouterr().err).splitlines()
    assert lines[0].startswith("note: compiling DeepSpeed's ShareMemComm (1 of 2): about ")
    assert lines[1].startswith("note: compiled ShareMemComm in ")
    assert lines[2].startswith("note: compiling DeepSpeed's CPUAdam (2 of 2): about ")
    assert lines[3].startswith("translution: error: DeepSpeed's ops do not compile: CPUAdamBuilder (log: ")
    assert len(lines) == 4
    fake_ops.fail()
    assert run(["preflight", str(folder), "--compile", "--json"]) == 0
    lines = without_version_notes(capsys.readouterr().err).splitlines()
    assert lines[0].startswith("note: compiling DeepSpeed's CPUAdam (1 of 1): about ")
    assert lines[-1] == "note: the DeepSpeed ops that the ranks need are compiled"
    loaded = fake_ops.loaded()
    assert run(["preflight", str(folder), "--compile"]) == 0
    assert (
        without_version_notes(capsys.readouterr().err) == "note: the DeepSpeed ops that the ranks need are compiled\n"
    )
    assert fake_ops.loaded() == loaded


def test_every_host_compiles_and_shows_its_progress(
    tmp_path: Path, fake_ops: FakeOps, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A program named ssh runs the commands of both hosts here, each with a folder of ops of its own."""
    ssh = tmp_path / "bin" / "ssh"
    ssh.parent.mkdir()
    ssh.write_text(
        '#!/bin/sh\nfor word; do host=$last; last=$word; done\nexport FAKE_HOST="$host"\n'
        f'export TORCH_EXTENSIONS_DIR="{fake_ops.extensions}/$host" PATH="{Path(sys.executable).parent}:$PATH"\n'
        'mkdir -p "$TORCH_EXTENSIONS_DIR"\neval "$last"\n'
    )
    ssh.chmod(0o755)
    monkeypatch.setenv("PATH", f"{ssh.parent}:/usr/bin:/bin")
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR")
    folder = write_plan(tmp_path / "plan", 1, nodes=2, model=OFFLOADED, offload="cpu-optimizer")
    hosts = tmp_path / "hosts"
    hosts.write_text("one slots=1\ntwo slots=1\n")
    fake_ops.fail("CPUAdamBuildertwo")
    messages: list[str] = []
    with pytest.raises(RunFailedError, match=r"^host two: DeepSpeed's ops do not compile: CPUAdamBuilder \(log: "):
        compile_plan_ops(folder, target=LaunchTarget(hosts), on_message=messages.append)
    shown = [re.sub(r"[:,] about.*|in \d+ s", "", text) for text in messages]
    first = [
        "compiling DeepSpeed's ShareMemComm (1 of 2)",
        "compiled ShareMemComm ",
        "compiling DeepSpeed's CPUAdam (2 of 2)",
    ]
    assert [text for text in shown if text.startswith("one: ")] == [
        f"one: {text}" for text in [*first, "compiled CPUAdam "]
    ]
    assert [text for text in shown if text.startswith("two: ")] == [f"two: {text}" for text in first]
    assert len(shown) == 7
