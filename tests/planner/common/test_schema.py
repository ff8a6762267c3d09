"""Schemas in threads: pydantic builds them at first use, which is not safe in several threads at once."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import sys, threading
from translution.planner.common import Schema, build_schemas
from translution.planner.config import override, preset

sub = [*Schema.__subclasses__()]
sub += [each for schema in sub for each in schema.__subclasses__()]
print(all(schema.__pydantic_complete__ for schema in sub))
build_schemas()
print(all(schema.__pydantic_complete__ for schema in sub))
sys.setswitchinterval(1e-6)
together, found = threading.Barrier(8), []

def change(length):
    together.wait()
    found.append(override(preset(f"gpt-tiny/{length}"), operator="alpha", c1=2).name)

threads = [threading.Thread(target=change, args=(length,)) for length in range(100, 108)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print(*sorted(found))
"""


def test_threads_may_use_a_schema_for_the_first_time_together() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    names = [f"gpt-tiny/{length}" for length in range(100, 108)]
    assert (done.stdout.split(), done.stderr) == (["False", "True", *names], "")
