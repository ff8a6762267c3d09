"""A run's metrics through DeepSpeed's monitor: CSV files, TensorBoard or Weights & Biases."""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from translution.planner.common import write_text

MONITOR = "monitor"
"""Name of the monitor's folder in a run folder."""
PROJECT = "translution"
"""Name of the project in Weights & Biases."""


def _prepare_wandb(folder: Path) -> None:
    """Direct wandb's files to the run folder, and let a resumed run keep its run ID there."""
    number = folder / "wandb_run_id"
    if not number.exists():
        write_text(number, secrets.token_hex(4))
    for name, value in (
        ("WANDB_DIR", str(folder)),
        ("WANDB_RUN_ID", number.read_text(encoding="utf-8").strip()),
        ("WANDB_RESUME", "allow"),
    ):
        os.environ.setdefault(name, value)


class RunMonitor:
    """Writes metrics by step; made on the rank that writes metrics, after it has joined the process group.

    Args:
        kind: as in `TrainingSpec.monitor`.
        run: the run folder; a resumed run appends to the files there.
    """

    def __init__(self, kind: str, run: Path) -> None:
        self._master: Any = None
        if kind == "none":
            return
        from deepspeed.monitor.config import get_monitor_config
        from deepspeed.monitor.monitor import MonitorMaster

        folder = run / MONITOR
        folder.mkdir(exist_ok=True)
        section: dict[str, Any] = {"enabled": True}
        if kind == "wandb":
            _prepare_wandb(folder)
            section["project"] = PROJECT
        else:
            section |= {"output_path": str(folder), "job_name": kind}
        self._master = MonitorMaster(get_monitor_config({"csv_monitor" if kind == "csv" else kind: section}))
        if self._master.csv_monitor is not None:
            # Otherwise a new monitor writes a heading before its first line, in the middle of an existing file too.
            self._master.csv_monitor.filenames += [path.stem for path in (folder / kind).glob("*.csv")]

    def write(self, group: str, step: int, values: Mapping[str, float | None]) -> None:
        """Write the values of a step under ``group/name``, without those that are None."""
        if self._master is not None:
            events = [(f"{group}/{name}", value, step) for name, value in values.items() if value is not None]
            self._master.write_events(events)
