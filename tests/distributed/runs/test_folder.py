"""The ranks' status files, and not the launcher's exit code, decide whether a run succeeded."""

from __future__ import annotations

from pathlib import Path

import pytest

from translution.distributed.runs.folder import (
    first_weights,
    make_run_folders,
    new_run_folder,
    set_first_weights,
    status_path,
)
from translution.distributed.runs.status import (
    RankStatus,
    clear_statuses,
    read_status,
    read_statuses,
    write_status,
)
from translution.distributed.runs.verdict import raise_unless_finished
from translution.planner.common.errors import InputError, RunFailedError


@pytest.fixture
def run(tmp_path: Path) -> Path:
    for name in ("run", "plan"):
        (tmp_path / name).mkdir()
    (tmp_path / "plan" / "plan.json").write_text("{}")
    make_run_folders(tmp_path / "run", tmp_path / "plan")
    return tmp_path / "run"


def report(run: Path, rank: int, state: str, message: str = "") -> None:
    write_status(run, RankStatus.model_validate({"rank": rank, "state": state, "step": 7, "message": message}))


def test_a_run_folder_is_one_line_and_names_its_first_weights(run: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^run folder: '.*a.nb' is not allowed: must be one line"):
        new_run_folder(tmp_path / "plan", tmp_path / "a\nb")
    assert first_weights(run) is None
    set_first_weights(run, tmp_path / "network.safetensors")
    assert first_weights(run) == tmp_path / "network.safetensors"
    (run / "first_weights.json").write_text(100_000 * "[")
    with pytest.raises(InputError, match=r"first_weights\.json: not valid JSON: nested too deeply"):
        first_weights(run)


def test_all_finished_is_success_even_with_a_bad_exit_code(run: Path) -> None:
    report(run, 0, "finished")
    report(run, 1, "finished")
    raise_unless_finished(run, 2, exit_code=134)


def test_an_unfinished_rank_is_a_failure_even_with_exit_code_zero(run: Path) -> None:
    report(run, 0, "finished")
    report(run, 1, "training")
    with pytest.raises(RunFailedError, match="rank 1 was last seen training at step 7; launcher exit code 0"):
        raise_unless_finished(run, 2, exit_code=0)


def test_a_rank_that_never_started_is_named(run: Path) -> None:
    with pytest.raises(RunFailedError, match="rank 0 never started; rank 1 never started"):
        raise_unless_finished(run, 2, exit_code=0)


def test_a_failed_rank_is_named_first(run: Path) -> None:
    report(run, 0, "training")
    report(run, 1, "failed", "FloatingPointError: loss is nan")
    with pytest.raises(RunFailedError, match="rank 1 failed at step 7: FloatingPointError: loss is nan"):
        raise_unless_finished(run, 2, exit_code=1)


def test_the_rank_that_others_lost_is_named(run: Path) -> None:
    report(run, 0, "failed", "RuntimeError: [/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]")
    with pytest.raises(RunFailedError, match=r"rank 0 lost its connection at step 7: RuntimeError: .* closed by peer"):
        raise_unless_finished(run, 2, exit_code=1)
    report(run, 1, "failed", "SwapChangedError: rank 1: swap file a.swp changed on the drive")
    with pytest.raises(RunFailedError, match="rank 1 failed at step 7: SwapChangedError: rank 1: swap file"):
        raise_unless_finished(run, 2, exit_code=1)


def test_only_the_given_ranks_are_checked(run: Path) -> None:
    report(run, 5, "finished")
    raise_unless_finished(run, [5], exit_code=0)
    with pytest.raises(RunFailedError, match="rank 4 never started"):
        raise_unless_finished(run, [4], exit_code=0)


def test_a_damaged_status_is_named(run: Path) -> None:
    status_path(run, 0).write_text("{")
    with pytest.raises(InputError, match=r"rank_0.json: not valid JSON"):
        read_status(run, 0)


def test_a_damaged_status_does_not_hide_the_others(run: Path) -> None:
    report(run, 0, "finished")
    status_path(run, 1).write_text("")
    report(run, 2, "failed", "OSError: No space left on device")
    assert [status.rank for status in read_statuses(run)] == [0, 2]
    with pytest.raises(RunFailedError, match="rank 2 failed at step 7: OSError: No space left on device"):
        raise_unless_finished(run, 3, exit_code=1)


def test_ranks_that_a_smaller_launch_does_not_have_are_forgotten(run: Path) -> None:
    for rank in range(12):
        report(run, rank, "stopped", "SIGTERM")
    # One of two nodes starts its own ranks; the run has four now.
    clear_statuses(run, [2, 3], 4)
    assert [status.rank for status in read_statuses(run)] == [0, 1]
