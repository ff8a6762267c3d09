"""Locks of ranks: held as long as a process lives."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from translution.distributed.runs.lock import lock_rank, require_unlocked
from translution.planner.common.errors import InputError

HOLD = """
import sys
from pathlib import Path
from translution.distributed.runs.lock import lock_rank
lock_rank(Path(sys.argv[1]), 3)
print("locked", flush=True)
sys.stdin.readline()
"""


def test_a_rank_that_runs_is_named_until_its_process_ends(tmp_path: Path) -> None:
    require_unlocked(tmp_path)
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "locked\n"
        for check in (require_unlocked, lambda run: lock_rank(run, 3)):
            with pytest.raises(InputError, match=rf"still runs: process {process.pid} of .* is its rank 3$"):
                check(tmp_path)
        lock_rank(tmp_path, 2)
        process.kill()
        process.wait()
    lock_rank(tmp_path, 3)
