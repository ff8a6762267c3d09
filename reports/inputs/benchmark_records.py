"""Records of ``benchmarks/*.py``: the JSON files in ``reports/`` and ``benchmarks/results/``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, TypeVar

from pydantic import AfterValidator, TypeAdapter

from translution.planner.common import DISTRIBUTION, Provenance, Schema, parse_json

from ..render.document import read_input
from .run_accuracy import current_label

_VERSIONS = {"python": "Python", "translution": DISTRIBUTION}


class BenchmarkRecord(Schema):
    """Fields of every record."""

    command: str
    date: str
    machine: dict[str, str | int]
    """Processor, number of cores, and version of each package."""

    @property
    def made(self) -> Provenance:
        """Provenance of the record, as reports show it."""
        known = {"processor", "cores"}
        versions = {_VERSIONS.get(name, name): str(value) for name, value in self.machine.items() if name not in known}
        machine, cores = str(self.machine.get("processor", "unknown")), int(self.machine.get("cores", 0))
        return Provenance(command=self.command, time_utc=self.date, machine=machine, cores=cores, versions=versions)


class PairRow(Schema):
    """A quantity that was predicted and measured, in bytes or numbers."""

    what: Annotated[str, AfterValidator(current_label)]
    predicted: int
    measured: int


class RankRow(Schema):
    """An item or a peak of the memory of one rank of a run."""

    run: str
    rank: int
    tier: str
    what: Annotated[str, AfterValidator(current_label)]
    predicted_bytes: int
    measured_bytes: int
    ratio: float | None


class TimeRow(Schema):
    """Time of an estimate."""

    what: str
    seconds: float


class AccuracySections(Schema):
    """Sections of ``accuracy.json``; sections that were not run are empty."""

    counts: tuple[PairRow, ...] = ()
    passes: tuple[PairRow, ...] = ()
    ranks: tuple[RankRow, ...] = ()
    times: tuple[TimeRow, ...] = ()


class RehearsalRecord(Schema):
    """Rehearsal of one rank of a large cluster."""

    what: str
    made: Provenance
    seconds: float
    rows: tuple[PairRow, ...]


class Accuracy(BenchmarkRecord):
    """``accuracy.json``."""

    sections: AccuracySections
    predicted: str | None = None
    """Command and date of newer predictions for the recorded measurements; None if there are none."""
    rehearsal: RehearsalRecord | None = None


class StepRow(Schema):
    """Predicted and measured step time of a run."""

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


class PublicSummary(Schema):
    """What a group of published runs is judged by; ratios are predicted divided by published seconds."""

    runs: int
    median: float
    lowest: float
    highest: float
    within_20_percent: float
    inside_the_interval: float
    widest_above: float
    widest_below: float
    fitting: int | None = None
    """Runs whose predicted memory fits without headroom."""
    highest_utilization: float | None = None


class PublicRow(Schema):
    """Predicted and published step time of a run."""

    run: str
    gpu: str
    published_s: float
    predicted_s: float
    low_s: float
    high_s: float
    ratio: float
    inside: bool
    utilization: float | None = None
    """Predicted peak of a GPU's memory, divided by its size."""


class PublicFigure(Schema):
    """A published figure of a single run."""

    what: str
    source: str
    published: float
    predicted: float
    allowed: float
    ratio: float


class PublicFit(Schema):
    """A published micro-batch that fits or does not."""

    what: str
    source: str
    fitted: bool
    utilization: float
    """Predicted peak of a GPU's memory, divided by its size."""


class PublicRuns(BenchmarkRecord):
    """``public.json``."""

    summary: dict[str, PublicSummary]
    rows: tuple[PublicRow, ...]
    fits: tuple[PublicFit, ...] = ()
    figures: tuple[PublicFigure, ...]


class OperatorRow(Schema):
    """Timings of one layer."""

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
    """Time of a command, and the time allowed."""

    what: str
    seconds: float
    allowed: float


class SearchRow(Schema):
    """Time of a search."""

    what: str
    candidates: int
    seconds: float


class PlannerBenchmark(BenchmarkRecord):
    """``planner.json``."""

    commands: tuple[CommandRow, ...]
    searches: tuple[SearchRow, ...]


_Record = TypeVar("_Record")


def load_record(kind: type[_Record], path: Path) -> _Record:
    """Read a record.

    Args:
        kind: class of the record.
        path: JSON file.

    Raises:
        InputError: if the file is missing or invalid.
    """
    return parse_json(TypeAdapter(kind), read_input(path), str(path))
