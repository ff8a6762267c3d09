"""The committed gallery matches its command, the planner and the committed measurements."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from helpers.html_page import cells, table

from translution.cli.main import full_app, run
from translution.planner.analysis.comparison import comparison_rows
from translution.planner.analysis.estimate_model import operator_costs, with_operator
from translution.planner.analysis.growth import PlanPoint, best_points
from translution.planner.common.provenance import make_provenance
from translution.planner.config.loading import preset
from translution.planner.config.model_base import OPERATOR_LABELS
from translution.planner.config.training import TrainingSpec
from translution.planner.hardware.cluster import load_cluster
from translution.planner.plans.plan import load_plan
from translution.planner.simulator.network.ops import DtypeSizes
from translution.reports.inputs.benchmark_records import Accuracy, PublicRuns, StepTimes, load_record
from translution.reports.render import markdown
from translution.reports.render.document import CellValue, Document, Section, format_value, load_document
from translution.reports.sections.accuracy import accuracy_section, step_time_section
from translution.reports.sections.benchmarks import benchmark_sections
from translution.reports.sections.experiment import experiment_section, load_results
from translution.reports.sections.model_costs import costs_section
from translution.reports.sections.public_runs import public_section

BF16 = TrainingSpec(precision="bf16", data="synthetic")
MADE = make_provenance("translution report --model x --out y.html")


@pytest.fixture
def committed(root: Path) -> Document:
    return load_document(root / "reports" / "gallery" / "gallery.json")


def test_committed_markdown_matches_the_committed_json(root: Path, committed: Document) -> None:
    text = (root / "reports" / "gallery" / "README.md").read_text(encoding="utf-8")
    assert text == markdown.render_markdown(committed), "run: make reports"
    named = re.findall(r"\]\(([^)]+\.svg)\)", text)
    assert sorted(named) == sorted(path.name for path in (root / "reports" / "gallery").glob("*.svg"))


def test_committed_page_matches_the_committed_json(root: Path, committed: Document) -> None:
    on_page = cells(root / "reports" / "gallery" / "index.html")
    assert set(on_page) == {table.key for table in committed.tables}
    for own in committed.tables:
        kinds = [column.kind for column in own.columns]
        for row, texts in zip((*own.rows, *own.foot), on_page[own.key], strict=True):
            assert texts == [format_value(value, kind) for value, kind in zip(row, kinds, strict=True)], (
                "run: make reports"
            )


def sections(root: Path) -> Iterator[Section]:
    """Yield the sections of the committed measurements, rendered now."""
    yield accuracy_section(load_record(Accuracy, root / "reports" / "accuracy.json"))
    yield step_time_section(load_record(StepTimes, root / "reports" / "step_time.json"))
    yield public_section(load_record(PublicRuns, root / "reports" / "public.json"))
    if list((root / "reports" / "experiments").glob("*/result.json")):
        yield from map(experiment_section, load_results(root / "reports" / "experiments"))
    yield from benchmark_sections(root / "benchmarks" / "results")


def without_specs(section: Section) -> dict[str, Any]:
    """Return a section without its charts, whose specification may change with the version of altair."""
    fields = section.model_dump()
    for part in fields["parts"]:
        part.pop("spec", None)
    return fields


def test_committed_gallery_contains_the_committed_measurements(root: Path, committed: Document) -> None:
    held = {section.key: section for section in committed.sections}
    now = list(sections(root))
    assert len(now) >= 4
    for section in now:
        assert section.key in held, "run: make reports"
        assert without_specs(held[section.key]) == without_specs(section), "run: make reports"


@pytest.mark.slow
def test_committed_figures_equal_those_of_the_planner(committed: Document) -> None:
    spec, cluster = preset("vit-base/16"), load_cluster("8xH100")
    held = [row for row in table(committed, "costs-table") if row["model"] == "vit-base/16"]
    assert [row["operator"] for row in held] == list(OPERATOR_LABELS.values())
    for operator, row in zip(OPERATOR_LABELS, held, strict=True):
        model = with_operator(spec, operator)  # type: ignore[arg-type]  # its own keys
        assert model is not None
        costs = operator_costs(model, 1, DtypeSizes.of(2, "cuda"))
        assert row["parameters"] == costs.parameters.total
        assert row["saved, published code"] == costs.activations.published
        assert row["saved, this toolkit"] == costs.activations.ours
        assert row["training"] == costs.flops.training_step
    assert costs_section([spec], BF16, MADE).parts[0].model_dump()["rows"][0] == tuple(held[0].values())
    glance = [row for row in table(committed, "glance-table") if row["model"] == "vit-base/16"]
    for row, point in zip(glance, best_points(spec, cluster, BF16), strict=True):
        check_point(row, point)
    rows = [row for row in table(committed, "comparison-table") if row["model"] == "vit-base/16"]
    for row, other in zip(rows, comparison_rows(spec, "H100", BF16), strict=True):
        assert (row["states"], row["saved / sample"]) == (other.states_bytes, other.saved_bytes)
        assert (row["smallest cluster"], row["smallest with offload"]) == (other.cluster, other.offload_cluster)
        assert row["time / sample"] == pytest.approx(other.sample_s)


def check_point(row: dict[str, CellValue], point: PlanPoint) -> None:
    assert (row["operator"], row["parameters"], row["device memory of a rank"]) == (
        point.operator, point.parameters, point.device_bytes,
    ), "run: make reports"  # fmt: skip
    assert row["step (interval)"] == pytest.approx((point.likely_s, point.low_s, point.high_s))
    assert row["best plan"] == point.plan


def test_every_command_of_the_gallery_is_valid(root: Path, committed: Document) -> None:
    program = typer.main.get_command(full_app())
    parts = [part for section in committed.sections for part in section.parts]
    commands = {part.made.command for part in parts if part.made is not None} | {committed.made.command}
    commands |= {str(row["value"]) for row in table(committed, "summary") if row["property"] == "Command"}
    assert len(commands) >= 8
    for command in commands:
        assert "/tmp" not in command and str(root) not in command
        first, *words = shlex.split(command)
        if first == "python":
            # The options of the check of a GPU are those of its package.
            place = "benchmarks/gpu_parts/main.py" if words[0] == "scripts/gpu_check.py" else words[0]
            script = (root / place).read_text(encoding="utf-8")
            options = [word for word in words[1:] if word.startswith("--")]
            assert all(f'"{option}"' in script for option in options)
            continue
        assert first == "translution"
        found = program.get_command(None, words[0])  # type: ignore[attr-defined, arg-type]
        assert found is not None, command
        found.make_context(words[0], words[1:])  # Parses the options without running the command.


def test_committed_gallery_was_made_by_make_reports(root: Path, committed: Document, tmp_path: Path) -> None:
    environment = tmp_path / "environment"
    environment.mkdir()
    (environment / ".demo").touch()
    make = shutil.which("make")
    assert make is not None
    words = [make, "--dry-run", "--old-file", f"{environment}/.demo", "reports", f"VENV={environment}"]
    done = subprocess.run(words, cwd=root, capture_output=True, text=True, check=True)
    lines = done.stdout.replace("\\\n", " ").splitlines()
    commands = [shlex.split(line) for line in lines if "/bin/translution " in line]
    assert [command[1] for command in commands] == ["plan", "report"]
    assert ["translution", *commands[1][1:]] == shlex.split(committed.made.command), "run: make reports"
    (summary,) = [row["value"] for row in table(committed, "summary") if row["property"] == "Command"]
    assert shlex.split(str(summary))[:3] == ["translution", *commands[0][1:3]]


def test_command_of_the_gallery_reproduces_its_plan(committed: Document, tmp_path: Path) -> None:
    rows = table(committed, "summary")
    (command,) = [str(row["value"]) for row in rows if row["property"] == "Command"]
    words = shlex.split(command.replace("PLAN", str(tmp_path / "plan")))
    assert run(words[1:]) == 0
    prediction = load_plan(tmp_path / "plan").prediction
    (breakdown,) = (own for own in committed.tables if own.key == "breakdown-0")
    peaks = {peak.phase: peak.bytes for peak in prediction.peaks if peak.tier == "device"}
    assert (
        dict(zip([column.title for column in breakdown.columns], breakdown.foot[0], strict=True)).items()
        >= peaks.items()
    )
