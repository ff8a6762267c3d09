"""Failures in words, and whose they are."""

from __future__ import annotations

import errno
import os
import shutil
from collections import namedtuple
from pathlib import Path

import pytest

from translution.distributed.training.failure import describe_failure

Usage = namedtuple("Usage", "total used free")


def caught(error: BaseException, cause: BaseException | None = None) -> BaseException:
    try:
        raise error from cause
    except BaseException as found:
        return found


def test_an_error_without_a_message_shows_the_line_that_raised_it(tmp_path: Path) -> None:
    numbers = [1]
    with pytest.raises(AssertionError) as found:
        exec(compile("def check(x):\n    assert x == []\ncheck(numbers)", "swapper.py", "exec"), {"numbers": numbers})
    text, cause = describe_failure(found.value, [tmp_path])
    assert text == "AssertionError: without a message, from `` in swapper.py, line 2"
    assert cause == "own"
    text, _ = describe_failure(caught(KeyError()), [tmp_path])
    assert text == "KeyError: without a message, from `raise error from cause` in test_failure.py, line 20"
    assert describe_failure(ValueError(), [tmp_path]) == ("ValueError: without a message", "own")


def test_errors_of_the_system_are_in_its_words(tmp_path: Path) -> None:
    error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/data/swap.bin")
    assert describe_failure(error, [tmp_path]) == ("OSError: No space left on device: /data/swap.bin", "own")


def test_a_write_that_torch_reports_vaguely_names_the_full_drive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 832 vs 726")
    assert describe_failure(error, [tmp_path]) == (f"RuntimeError: {error}", "own")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**9, 10**9 - 4096, 4096))
    assert describe_failure(error, [tmp_path])[0].endswith(
        f"; No space left on device: {tmp_path} has 4,096 bytes left"
    )
    # A drive that is full by chance does not explain other errors.
    assert describe_failure(FloatingPointError("loss is nan"), [tmp_path])[0] == "FloatingPointError: loss is nan"


def test_a_file_that_is_gone_is_named_by_the_function_that_reads_it(tmp_path: Path) -> None:
    def read(path: str) -> None:  # The variable's name tells what it is.
        raise AssertionError("a read failed")

    for gone, text in ((tmp_path / "x.swp", f"; {tmp_path / 'x.swp'} does not exist any more"), (tmp_path, "")):
        with pytest.raises(AssertionError) as found:
            read(str(gone))
        assert describe_failure(found.value, [tmp_path])[0] == f"AssertionError: a read failed{text}"


def test_a_folder_that_is_gone_or_read_only_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    error = caught(AssertionError())
    assert describe_failure(error, [tmp_path / "gone"])[0].endswith(f"; {tmp_path / 'gone'} does not exist any more")
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert describe_failure(error, [tmp_path])[0].endswith(f"; {tmp_path} cannot be written: Read-only file system")


@pytest.mark.parametrize(
    "text",
    [
        "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:40111",
        "NCCL communicator was aborted on rank 3.",
        "wait timeout after 600000ms, keys: /default_pg/0//cpu//0/0",
    ],
)
def test_a_lost_connection_is_the_fault_of_others(tmp_path: Path, text: str) -> None:
    assert describe_failure(RuntimeError(text), [tmp_path])[1] == "connection"
    wrapped = caught(RuntimeError("checkpoint of step 4 could not be written"), RuntimeError(text))
    assert describe_failure(wrapped, [tmp_path])[1] == "connection"
