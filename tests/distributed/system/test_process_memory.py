"""What the C library does with freed blocks."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

BLOCKS, BLOCK_BYTES = 100, 2**20

PROGRAM = f"""
import sys
from translution.distributed.system.process_memory import process_bytes, return_freed_blocks

took = return_freed_blocks() if sys.argv[1] == "return" else None
import torch

def block():
    return torch.ones({BLOCK_BYTES} // 4)

# A large block that is freed raises glibc's threshold, so that smaller ones come from its heap.
large = torch.ones(2**22)
del large
before = process_bytes()["resident"]
blocks, last = [block() for _ in range({BLOCKS})], torch.ones(1000)
kept = blocks[-1:]
del blocks
print(took, process_bytes()["resident"] - before)
"""


def resident_after_freeing(word: str, **variables: str) -> tuple[str, int]:
    """Return what `return_freed_blocks` returned, and the bytes of freed blocks that the process still holds."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    command = [sys.executable, "-c", PROGRAM, word]
    done = subprocess.run(command, env=environment | variables, capture_output=True, text=True, check=True)
    took, size = done.stdout.split()
    return took, int(size)


@pytest.mark.slow
def test_freed_blocks_are_given_back() -> None:
    took, size = resident_after_freeing("return")
    assert took == "True"
    # One block is still in use.
    assert size < 8 * BLOCK_BYTES


@pytest.mark.slow
def test_without_it_glibc_keeps_them() -> None:
    assert resident_after_freeing("keep")[1] > BLOCKS * BLOCK_BYTES / 2


@pytest.mark.slow
@pytest.mark.parametrize(
    "variables",
    [{"MALLOC_MMAP_THRESHOLD_": "33554432"}, {"GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=33554432"}],
)
def test_a_threshold_that_the_user_has_set_stays(variables: dict[str, str]) -> None:
    took, size = resident_after_freeing("return", **variables)
    assert took == "False"
    assert size > BLOCKS * BLOCK_BYTES / 2
