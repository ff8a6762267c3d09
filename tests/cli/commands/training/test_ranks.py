"""Hidden commands that job scripts start on each node."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.fake_ops import FakeOps
from helpers.runs import write_plan

from translution.cli.main import run


@pytest.mark.parametrize(("node", "prefix"), [(None, ""), ("node7", "node7: ")])
def test_a_node_that_compiles_names_itself_in_a_job(
    node: str | None,
    prefix: str,
    tmp_path: Path,
    fake_ops: FakeOps,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delenv("SLURMD_NODENAME", raising=False)
    if node is not None:
        monkeypatch.setenv("SLURMD_NODENAME", node)
    folder = write_plan(tmp_path / "plan", 1)
    assert run(["preflight-node", str(folder), "--compile"]) == 0
    first, last = capsys.readouterr().out.splitlines()
    assert first.startswith(f"{prefix}compiling DeepSpeed's ShareMemComm (1 of 1): about ")
    assert last.startswith(f"{prefix}compiled ShareMemComm in ")
    assert run(["preflight-node", str(folder), "--compile"]) == 0
    assert capsys.readouterr().out == ""
