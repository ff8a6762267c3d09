"""Does the trials and writes the fault table."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from translution.planner.common import Provenance, make_provenance

from . import files, processes
from .trial import LIMIT_S, PATIENCE_S, Outcome

PACKAGES = ("torch", "deepspeed")


@dataclass(frozen=True)
class Fault:
    """A fault, and what must be said about it."""

    kind: str
    make: Callable[[Path], Outcome]
    message: str
    """Regular expression that the message must match."""
    exit_code: int = 1
    lost_steps: int = 5
    """Steps that may be lost, at most: those since the last checkpoint, and the one in progress."""
    needs_root: bool = False
    quick: bool = False
    """True for those that CI makes."""
    limit_s: float = LIMIT_S

    @property
    def name(self) -> str:
        """Name of the fault."""
        return self.make.__name__

    @property
    def text(self) -> str:
        """What happens."""
        return " ".join((self.make.__doc__ or "").split())

    def problems(self, outcome: Outcome) -> list[str]:
        """Return what is wrong with how a run with this fault has ended."""
        found = [] if re.search(self.message, outcome.message) else [f"the message is {outcome.message!r}"]
        found += [] if outcome.exit_code == self.exit_code else [f"the exit code is {outcome.exit_code}"]
        found += [] if outcome.seconds <= self.limit_s else [f"it took {outcome.seconds:.0f} s"]
        found += [] if outcome.lost_steps <= self.lost_steps else [f"{outcome.lost_steps} steps are lost"]
        return found + [f"left: {name}" for name in outcome.left]


FAULTS = (
    Fault("kill", processes.killed_while_starting, "rank 1 was killed by SIGKILL in its start", lost_steps=0),
    Fault("kill", processes.killed_while_training, r"rank 1 was killed by SIGKILL at step \d+, in", quick=True),
    Fault("kill", processes.killed_first_rank, r"rank 0 was killed by SIGKILL at step \d+, in"),
    Fault("kill", processes.killed_while_saving, r"rank 1 was killed by SIGKILL at step \d+, in a checkpoint's saving"),
    Fault("kill", processes.killed_launcher, r"rank 1: (died while training|failed) at step \d+, ", quick=True),
    Fault("kill", processes.killed_together, r"rank 1: (died while training|failed) at step \d+, "),
    Fault("stop", processes.stopped, r"rank 1 was stopped by a signal .* saved at step \d+", lost_steps=0, quick=True),
    Fault("stop", processes.stopped_for_ever, r"rank 1 was stopped by a signal \d+ s ago, at step \d+"),
    Fault("end", processes.interrupted, r"interrupted; saved at step \d+", exit_code=130, lost_steps=0, quick=True),
    Fault("end", processes.rank_asked_to_end, r"stopped by SIGTERM; saved at step \d+", lost_steps=0),
    Fault("memory", processes.out_of_memory, "rank [01] was killed by SIGKILL .* want of memory", needs_root=True),
    Fault("twice", processes.launched_twice, "run: still runs: process", exit_code=2, lost_steps=0, quick=True),
    Fault("full", files.full_drive, "No space left on device", needs_root=True, quick=True, lost_steps=6),
    Fault("read-only", files.read_only_folder, "Read-only file system", needs_root=True),
    Fault("slow", files.slow_drive, "^$", exit_code=0, lost_steps=0, limit_s=300.0),
    Fault(
        "deleted", files.swap_file_deleted, r"rank 1 failed at step \d+, .*\.swp does not exist any more", quick=True
    ),
    Fault("corrupted", files.swap_file_changed, "rank 1 failed .*swap file .* changed"),
    Fault(
        "corrupted",
        files.damaged,
        r"checkpoint/step_\d+/.*damaged; remove .* to resume from step_\d+",
        exit_code=2,
        lost_steps=0,
        quick=True,
    ),
    Fault("exchanged", files.exchanged, r"checkpoint/step_\d+/", exit_code=2, lost_steps=0, quick=True),
    Fault("deleted", files.file_deleted, r"checkpoint/step_\d+", exit_code=2, lost_steps=0, quick=True),
    Fault(
        "corrupted", files.manifest_cut, r"checkpoint/step_\d+/manifest.json", exit_code=2, lost_steps=14, quick=True
    ),
    Fault("corrupted", files.metrics_damaged, "^$", exit_code=0, lost_steps=0, quick=True),
    Fault("exchanged", files.data_exchanged, "data: .* its content is not what", exit_code=1, lost_steps=0),
)
"""All faults, in the order of the table."""


def run_fault(fault: Fault, folder: Path, *, keep: bool = False) -> Outcome:
    """Make a fault in an empty folder, and remove the folder unless it is to be kept."""
    try:
        return fault.make(folder)
    finally:
        if not keep:
            shutil.rmtree(folder, ignore_errors=True)


def to_markdown(rows: Sequence[tuple[Fault, Outcome]], made: Provenance) -> str:
    """Return the page with the table."""
    versions = ", ".join(f"{name} {version}" for name, version in made.versions.items())
    lines = [
        "# Faults",
        "",
        "What happens to a run of two ranks when something breaks: seconds from the fault to the end of the launcher,",
        "steps that no checkpoint holds, what is left besides the run folder, and what the user reads.",
        "",
        f"Made with `{made.command}` on {made.machine}, {made.cores} cores, {versions}, {made.time_utc}.",
        "",
        "| fault | seconds | steps lost | left | exit code | message |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for fault, outcome in rows:
        message = outcome.message.replace("|", "\\|") or "(none: the run goes on)"
        left = ", ".join(outcome.left) or "nothing"
        cells = [fault.text, f"{outcome.seconds:.1f}", outcome.lost_steps, left, outcome.exit_code, message]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Make the faults and write the table; return 1 if one did not end as it should."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="faults to make; all by default")
    parser.add_argument("--out", type=Path, help="file for the table")
    arguments = parser.parse_args()
    chosen = [fault for fault in FAULTS if not arguments.names or fault.name in arguments.names]
    rows, bad = list[tuple[Fault, Outcome]](), 0
    for fault in chosen:
        if fault.needs_root and os.geteuid() != 0:
            print(f"{fault.name}: left out: needs root", flush=True)
            continue
        with tempfile.TemporaryDirectory(prefix="translution-fault-") as parent:
            try:
                outcome = run_fault(fault, Path(parent) / "trial")
            except (RuntimeError, OSError, subprocess.SubprocessError) as error:
                outcome = Outcome(PATIENCE_S, -1, f"{type(error).__name__}: {error}", 0, ())
        rows.append((fault, outcome))
        problems = fault.problems(outcome)
        bad += bool(problems)
        print(
            f"{fault.name}: {outcome.seconds:.1f} s: {'; '.join(problems) or 'as expected'}: {outcome.message}",
            flush=True,
        )
    if arguments.out is not None:
        made = make_provenance("make faults", PACKAGES)
        arguments.out.write_text(to_markdown(rows, made), encoding="utf-8")
        arguments.out.with_suffix(".json").write_text(
            json.dumps(
                {"made": made.model_dump(), "faults": {f.name: dataclasses.asdict(o) for f, o in rows}}, indent=2
            )
            + "\n"
        )
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
