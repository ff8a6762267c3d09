"""What ``benchmarks/*.py`` have recorded: the JSON files that stand in ``reports/`` and ``benchmarks/results/``."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from pydantic import TypeAdapter

from translution.planner.common.provenance import DISTRIBUTION, Provenance
from translution.planner.common.schema import Schema, parse_json

from ..render.document import read_input

_VERSIONS = {"python": "Python", "translution": DISTRIBUTION}


class BenchmarkRecord(Schema):
    """What all of them say of how they were made."""

    command: str
    date: str
    machine: dict[str, str | int]
    """Processor, cores, and versions by package."""

    @property
    def made(self) -> Provenance:
        """The same as reports show it."""
        known = {"processor", "cores"}
        versions = {_VERSIONS.get(name, name): str(value) for name, value in self.machine.items() if name not in known}
        machine, cores = str(self.machine.get("processor", "unknown")), int(self.machine.get("cores", 0))
        return Provenance(command=self.command, time_utc=self.date, machine=machine, cores=cores, versions=versions)


class PairRow(Schema):
    """One thing that was predicted and measured."""

    what: str
    predicted: int
    measured: int


class RankRow(Schema):
    """One entry or peak of a rank of a run."""

    run: str
    rank: int
    tier: str
    what: str
    predicted_bytes: int
    measured_bytes: int
    ratio: float | None


class TimeRow(Schema):
    """How long an estimate took."""

    what: str
    seconds: float


class AccuracySections(Schema):
    """The parts of ``accuracy.json``; those that were not run are absent."""

    counts: tuple[PairRow, ...] = ()
    passes: tuple[PairRow, ...] = ()
    ranks: tuple[RankRow, ...] = ()
    times: tuple[TimeRow, ...] = ()


class RehearsalRecord(Schema):
    """One rank of a large world."""

    what: str
    made: Provenance
    seconds: float
    rows: tuple[PairRow, ...]


class Accuracy(BenchmarkRecord):
    """``accuracy.json``."""

    sections: AccuracySections
    predicted: str | None = None
    """When and by which command the predictions were made anew, in words."""
    rehearsal: RehearsalRecord | None = None


class StepRow(Schema):
    """A run whose step was timed."""

    what: str
    predicted_s: float
    low_s: float
    high_s: float
    measured_s: float
    slowest_s: float
    fastest_s: float
    parts: dict[str, float]


class StepTimes(BenchmarkRecord):
    """``step_time.json``."""

    rates: dict[str, object]
    rows: tuple[StepRow, ...]


class OperatorRow(Schema):
    """A layer that was timed."""

    case: str
    batch: int
    grouped_seconds: float
    grouped_peak_bytes: int
    operations: int
    matmul_seconds: float
    matmul_flop_per_s: float
    matmul_rate_share: float
    gather_seconds: float | None = None
    times_faster: float | None = None
    gather_peak_bytes: int | None = None
    times_smaller: float | None = None


class AlphaRow(Schema):
    """α-Translution against attention with the same projections."""

    batch: int
    alpha_seconds: float
    plain_seconds: float
    time_ratio: float
    operations_ratio: float


class OperatorBenchmark(BenchmarkRecord):
    """``operator.json``."""

    parity: float
    results: tuple[OperatorRow, ...]
    alpha: AlphaRow | None = None


class CommandRow(Schema):
    """How long a command took."""

    what: str
    seconds: float
    allowed: float


class SearchRow(Schema):
    """How long a search took."""

    what: str
    candidates: int
    seconds: float


class PlannerBenchmark(BenchmarkRecord):
    """``planner.json``."""

    commands: tuple[CommandRow, ...]
    searches: tuple[SearchRow, ...]


_Record = TypeVar("_Record")


def load_record(kind: type[_Record], path: Path) -> _Record:
    """Read one of these files.

    Args:
        kind: which of the classes above.
        path: of the file.

    Raises:
        InputError: if it is absent or damaged.
    """
    return parse_json(TypeAdapter(kind), read_input(path), str(path))
