"""Latency of the calculator's answers and plans with many concurrent readers.

Readers are threads that send HTTP requests over loopback to `translution serve` with its default number of workers.
Each reader changes one or two fields of its choice, waits until the plan is shown or its patience runs out, pauses for
a second on average, and repeats. Readers, server and workers share the machine.
"""

from __future__ import annotations

import argparse
import http.client
import os
import random
import statistics
import subprocess
import sys
import threading
import time
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from common import describe_run, write_report

from translution.planner.config import OPERATORS, PRESET_NAMES
from translution.planner.hardware import load_catalog
from translution.reports.calculator import Choice, popular_choices, query_of

PATIENCE_S, THINK_S = 10.0, 1.0
"""Maximum wait of a reader for a plan, and mean pause after it."""
ALLOWED_S = 0.3
"""Allowed 95th percentile of the latency of an answer."""
FIELDS: dict[str, tuple[object, ...]] = {
    "model": PRESET_NAMES,
    "operator": OPERATORS,
    "gpu": tuple(load_catalog().gpus),
    "gpus": (1, 2, 4, 8),
    "nodes": (1, 2, 3, 4, 8, 16),
    "precision": ("bf16", "fp16", "fp32"),
    "minimize": ("time", "nodes", "cost", "memory"),
    "checkpointing": (None, "none", "block", "offload"),
    "steps": (1_000, 10_000, 100_000, 1_000_000),
}


class Reader(threading.Thread):
    """One reader with its own connection.

    Args:
        port: port of the server.
        number: seed of the reader's choices.
        until: time at which the reader stops, on the clock of ``time.perf_counter``.
        known: choices to draw from; if empty, the reader changes fields at random.
    """

    def __init__(self, port: int, number: int, until: float, known: list[Choice]) -> None:
        super().__init__()
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        self._random, self._until, self._known = random.Random(number), until, known
        self._choice = Choice()
        self.answers: list[float] = []
        self.infeasible = 0
        self.plans: list[float] = []
        self.at_once = 0
        self.left = 0

    def get(self, path: str) -> tuple[int, str]:
        """Request a path; return the status and the body."""
        self._connection.request("GET", path)
        response = self._connection.getresponse()
        return response.status, response.read().decode()

    def _next(self) -> Choice:
        if self._known:
            return self._random.choice(self._known)
        names = self._random.sample(list(FIELDS), self._random.choice((1, 2)))
        return self._choice.replacing(**{name: self._random.choice(FIELDS[name]) for name in names})

    def _wait(self, query: str, began: float, body: str) -> None:
        if 'data-state="searching"' not in body and 'data-state="busy"' not in body:
            self.at_once += 1
            self.plans.append(time.perf_counter() - began)
            return
        while time.perf_counter() - began < PATIENCE_S:
            status, body = self.get(f"/plan?{query}")
            if status == 200 and 'data-state="searching"' not in body:
                self.plans.append(time.perf_counter() - began)
                return
            if status == 503:
                time.sleep(0.5)
        self.left += 1

    def run(self) -> None:
        """Choose, wait and pause until the time is over."""
        time.sleep(self._random.uniform(0, THINK_S))
        while time.perf_counter() < self._until:
            choice = self._next()
            query = query_of(choice)
            began = time.perf_counter()
            status, body = self.get(f"/answer?{query}")
            self.answers.append(time.perf_counter() - began)
            if status == 200:
                self._choice = choice
                self._wait(query, began, body)
            else:
                assert status == 422, body
                self.infeasible += 1
            time.sleep(min(4 * THINK_S, self._random.expovariate(1 / THINK_S)))


class Server(NamedTuple):
    """A server that the benchmark started."""

    port: int
    pid: int

    @property
    def processor_s(self) -> float:
        """CPU seconds of the server process without its workers (proc(5): utime and stime)."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextmanager
def serving(*arguments: str) -> Iterator[Server]:
    """Start a server, and stop it at the end of the block."""
    command = [sys.executable, "-m", "translution.cli", "serve", "--port", "0", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        url = urllib.parse.urlsplit(process.stdout.readline().split(" ")[0])
        yield Server(url.port or 0, process.pid)
    finally:
        process.terminate()
        process.wait()


def prepare(server: Server, choices: list[Choice]) -> None:
    """Wait until the server has finished the searches of all choices."""
    reader = Reader(server.port, 0, 0, [])
    for choice in choices:
        while reader.get(f"/api/plan?{query_of(choice)}")[0] == 202:
            pass


def spread(seconds: list[float]) -> dict[str, Any]:
    """Return count, median, 95th percentile and maximum."""
    if len(seconds) < 2:
        return {"count": len(seconds), "p50_s": None, "p95_s": None, "max_s": max(seconds, default=None)}
    cuts = statistics.quantiles(seconds, n=20, method="inclusive")
    return {"count": len(seconds), "p50_s": statistics.median(seconds), "p95_s": cuts[18], "max_s": max(seconds)}


def scenario(name: str, server: Server, users: int, seconds: float, known: list[Choice]) -> dict[str, Any]:
    """Run the readers for some seconds and return their latencies and counts."""
    load, before = os.getloadavg()[0], server.processor_s
    readers = [Reader(server.port, number, time.perf_counter() + seconds, known) for number in range(users)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    count = sum(len(reader.answers) for reader in readers)
    return {
        "scenario": name,
        "processor_s": (server.processor_s - before) / max(1, count),
        "answers": spread([second for reader in readers for second in reader.answers]),
        "refused": sum(reader.infeasible for reader in readers),
        "plans": spread([second for reader in readers for second in reader.plans]),
        "at_once": sum(reader.at_once for reader in readers),
        "left": sum(reader.left for reader in readers),
        "load_before": load,
    }


def _cells(values: dict[str, Any], unit: float, form: str) -> str:
    cells = ["–" if values[key] is None else format(values[key] * unit, form) for key in ("p50_s", "p95_s", "max_s")]
    return f"{values['count']:,} | {' | '.join(cells)}"


def render(document: dict[str, Any]) -> str:
    """Return the report as Markdown."""
    versions = ", ".join(f"{name} {version}" for name, version in document["machine"].items())
    rows = document["results"]
    lines = ["# Speed of the calculator", "", f"`{document['command']}` on {document['date']}: {versions}.", ""]
    lines += [
        f"{document['users']} readers for {document['seconds']:g} s per scenario, on the machine that also runs the "
        f"searches, at niceness {document['niceness']}. Load average (1 min) of the machine before each scenario: "
        f"{', '.join(format(row['load_before'], '.1f') for row in rows)}.",
        "",
        f"An answer (`/answer`) has the exact costs, and the plan if it is known. Allowed at the 95th percentile: "
        f"{1000 * ALLOWED_S:.0f} ms. *CPU*: time of the server process per answer, including the plans it sends.",
        "",
        "| readers choose | answers | p50, ms | p95, ms | maximum, ms | CPU, ms |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    lines += [
        f"| {row['scenario']} | {_cells(row['answers'], 1000, '.0f')} | {1000 * row['processor_s']:.0f} |"
        for row in rows
    ]
    lines += [
        "",
        f"Time from a choice until its plan, or the message that nothing fits, is shown; readers wait {PATIENCE_S:g} s "
        "at most. *Immediate*: shown with the answer. *Gave up*: not shown within that time.",
        "",
        "| readers choose | shown | p50, s | p95, s | maximum, s | immediate | gave up |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    lines += [
        f"| {row['scenario']} | {_cells(row['plans'], 1, '.2f')} | {row['at_once']:,} | {row['left']:,} |"
        for row in rows
    ]
    missed = [row["scenario"] for row in rows if (row["answers"]["p95_s"] or 0) > ALLOWED_S]
    return "\n".join([*lines, "", f"Above the allowed latency: {', '.join(missed) or 'none'}.", ""])


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--users", type=int, default=20, help="number of concurrent readers")
    parser.add_argument("--seconds", type=float, default=60.0, help="duration of each scenario in seconds")
    parser.add_argument(
        "--choices", type=int, default=60, help="number of popular choices that are searched before the second scenario"
    )
    parser.add_argument("--out", type=Path, help="folder for serve.md and serve.json")
    arguments = parser.parse_args()
    document = describe_run("serve") | {
        "users": arguments.users,
        "seconds": arguments.seconds,
        "niceness": os.nice(0),
    }
    with serving("--no-warm") as server:
        new = scenario("any choice, no plan known before", server, arguments.users, arguments.seconds, [])
    known = list(islice(popular_choices(), arguments.choices))
    with serving() as server:
        prepare(server, known)
        name = f"among {len(known)} popular choices, searched before"
        warmed = scenario(name, server, arguments.users, arguments.seconds, known)
    document["results"] = [new, warmed]
    write_report(arguments.out, "serve", document, render(document))


if __name__ == "__main__":
    main()
