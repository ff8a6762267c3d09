"""The end of a process group: gloo's threads are waited for."""

from __future__ import annotations

from pathlib import Path

import pytest

from translution.distributed.system import network


def thread(tasks: Path, number: int, name: str, state: str) -> None:
    (tasks / str(number)).mkdir(parents=True)
    (tasks / str(number) / "stat").write_text(f"{number} ({name}) {state} 1 2 3")


@pytest.mark.parametrize(
    ("threads", "rests"),
    [
        ([("python", "R"), ("pt_gloo_runloop", "S"), ("pt_gloo_runloop", "S")], True),
        ([("python", "R"), ("pt_gloo_runloop", "S"), ("pt_gloo_runloop", "R")], False),
        ([("python", "R"), ("a (b) c", "R"), ("gloo_tcp_loop", "R")], True),
        ([("pt_gloo_runloop", "D")], False),
    ],
)
def test_only_threads_that_do_collectives_are_waited_for(
    threads: list[tuple[str, str]], rests: bool, tmp_path: Path
) -> None:
    for number, (name, state) in enumerate(threads):
        thread(tmp_path, number, name, state)
    assert network._gloo_rests(tmp_path) is rests


def test_without_a_group_nothing_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    # Another test of this process may have made one.
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: False)
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: pytest.fail("there is none"))
    network.leave_process_group()
