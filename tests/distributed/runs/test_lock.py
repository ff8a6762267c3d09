"""Locks of ranks: held as long as a process lives."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from translution.distributed.runs.lock import lock_rank, require_unlocked
from translution.planner.common.errors import InputError

HOLD = """
import sys
import threading
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


def test_the_lock_of_a_process_that_is_ending_is_waited_for(tmp_path: Path) -> None:
    """A killed process of which the kernel still closes the files: here another one holds its lock for a while."""
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen([sys.executable, "-c", ""]) as dead:
        os.waitid(os.P_PID, dead.pid, os.WEXITED | os.WNOWAIT)
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "locked\n"
            (tmp_path / "control" / "rank_3.lock").write_text(f"process {dead.pid} of {socket.gethostname()}\n")
            waiting = threading.Thread(target=require_unlocked, args=(tmp_path,))
            waiting.start()
            waiting.join(0.2)
            assert waiting.is_alive()
            process.kill()
            process.wait()
            waiting.join()
