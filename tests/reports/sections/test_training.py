"""The section on runs: each figure of several runs in one chart, with what was predicted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers.report_folders import plan_folder, run_folder

from translution.cli.main import run
from translution.planner.common.errors import InputError
from translution.reports.inputs.training_runs import MAX_RUNS, read_runs
from translution.reports.render.document import Document, Picture, load_document

FIGURES = {"loss": "curve", "seconds": "training-seconds", "samples_per_s": "training-throughput",
           "learning_rate": "training-rate", "grad_norm": "training-norm"}  # fmt: skip


def write_steps(folder: Path, factor: float) -> None:
    """Replace a run's metrics by four steps, the second of which has a loss that is not finite."""
    step = {"event": "step", "learning_rate": 1e-3 * factor, "samples_per_s": 100.0 * factor}
    rows: list[dict[str, Any]] = [
        step | {"step": n, "loss": (3 - n / 2) * factor, "grad_norm": n * factor, "seconds": 8 / (100 * factor)}
        for n in range(1, 5)
    ]
    rows[0]["seconds"] = 60.0
    rows[1]["loss"] = float("nan")
    rows[2]["grad_norm"] = None
    rows.append({"event": "evaluation", "step": 4, "loss": 1.25 * factor, "accuracy": 0.5})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def document(tmp_path_factory: pytest.TempPathFactory) -> Document:
    folder = tmp_path_factory.mktemp("runs")
    plan_folder(folder / "plan")
    for number, name in enumerate(("001", "002"), start=1):
        write_steps(run_folder(folder / "plan", name), number)
    runs = [str(folder / "plan" / "runs" / name) for name in ("001", "002")]
    files = ["--out", str(folder / "x.html"), "--data", str(folder / "x.json")]
    assert run(["report", *runs, *files]) == 0
    return load_document(folder / "x.json")


def lines(document: Document, key: str) -> dict[str, list[float]]:
    """Return the drawn values of each run."""
    (picture,) = [part for part in document.pictures if part.key == key]
    (rows,) = [rows for rows in picture.spec["datasets"].values() if set(rows[0]) == {"run", "step", "y"}]
    return {name: [row["y"] for row in rows if row["run"] == name] for name in dict.fromkeys(r["run"] for r in rows)}


def test_every_figure_of_both_runs_is_in_one_chart(document: Document) -> None:
    assert lines(document, FIGURES["loss"]) == {"001": [2.5, 1.5, 1.0], "002": [5.0, 3.0, 2.0]}
    assert lines(document, FIGURES["grad_norm"]) == {"001": [1, 2, 4], "002": [2, 4, 8]}
    assert lines(document, FIGURES["learning_rate"])["002"] == [2e-3] * 4
    assert lines(document, FIGURES["samples_per_s"])["002"] == [200.0] * 4
    assert lines(document, FIGURES["seconds"])["001"] == [60.0, 0.08, 0.08, 0.08]
    keys = [part.key for part in document.sections[0].parts if isinstance(part, Picture)]
    assert keys == list(FIGURES.values())


def test_predicted_time_is_drawn_and_compared(document: Document, tmp_path: Path) -> None:
    time = plan_folder(tmp_path / "plan").time
    assert time is not None
    (picture,) = [part for part in document.pictures if part.key == FIGURES["seconds"]]
    (expected,) = [rows for rows in picture.spec["datasets"].values() if "low" in rows[0]]
    wanted = {"y": time.likely_s, "low": time.low_s, "high": time.high_s}
    assert expected == [{"run": name} | wanted for name in ("001", "002")]
    (table,) = [table for table in document.tables if table.key == "training-table"]
    first, second = (dict(zip([c.title for c in table.columns], row, strict=True)) for row in table.rows)
    assert first["step, predicted (interval)"] == (time.likely_s, time.low_s, time.high_s)
    # The first step is left out.
    assert first["step, measured (fastest to slowest)"] == (0.08, 0.08, 0.08)
    assert second["predicted / measured"] == pytest.approx(time.likely_s / 0.04)
    assert (second["last loss"], second["held-out loss"], second["held-out accuracy"]) == (2.0, 2.5, "50.00%")


def test_plan_of_both_runs_is_shown_once_and_the_memory_of_each(document: Document) -> None:
    titles = [section.title for section in document.sections]
    assert titles[0] == "Training: 2 runs"
    assert sum(title.startswith("Memory over a step") for title in titles) == 1
    assert titles[-2:] == [f"Predicted and measured memory of run {name}" for name in ("001", "002")]
    keys = [part.key for section in document.sections for part in section.parts]
    assert len(keys) == len(set(keys))


def test_damaged_figures_are_left_out(tmp_path: Path) -> None:
    plan_folder(tmp_path / "plan")
    folder = run_folder(tmp_path / "plan", "001")
    rows = [{"event": "step", "step": "x"}, {"event": "step", "step": 2, "loss": "soon"}, {"event": "step", "step": 3}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (found,) = read_runs([folder])
    assert found.steps["step"].tolist() == [2, 3] and found.last("loss") is None
    (folder / "metrics.jsonl").write_text("{}\n{}\n")
    with pytest.raises(InputError, match="line 1: event: is required, the kind of the line as text"):
        read_runs([folder])


def test_more_runs_than_colours_are_refused(tmp_path: Path) -> None:
    plan_folder(tmp_path / "plan")
    folders = [run_folder(tmp_path / "plan", f"{number:03}") for number in range(MAX_RUNS + 1)]
    with pytest.raises(InputError, match="10 runs are not allowed in one report: at most 9"):
        read_runs(folders)
    assert len(read_runs([*folders[:MAX_RUNS], folders[0]])) == MAX_RUNS
