"""Reports with all kinds of sections: page, Markdown and JSON agree, and show the planner's figures."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.html_page import Page, cells, table
from helpers.report_folders import MALICIOUS, experiment_folder, plan_folder

from translution.cli.main import run
from translution.planner.analysis.growth import GrowthPoint, best_point, best_points, growth_points
from translution.planner.common.provenance import make_provenance
from translution.planner.config.loading import preset
from translution.planner.config.model import override
from translution.planner.config.training import TrainingSpec
from translution.planner.hardware.cluster import load_cluster
from translution.planner.plans.plan import load_plan
from translution.planner.search.plan_search import search_plan
from translution.planner.search.space import SearchConstraints
from translution.reports.builder import ReportBuilder, ReportRequest
from translution.reports.inputs.plan_command import plan_command
from translution.reports.render import markdown
from translution.reports.render.document import CellValue, ColumnKind, Document, Table, format_value, load_document
from translution.reports.sections.experiment import experiment_section, kind_name, load_results
from translution.reports.sections.scaling import scaling_section

Captured = pytest.CaptureFixture[str]
BF16 = TrainingSpec(precision="bf16", data="synthetic")
MADE = make_provenance("translution report --model x --out y.html")


@pytest.fixture
def small(gallery_folder: Path) -> Document:
    return load_document(gallery_folder / "gallery.json")


def test_value_is_formatted_by_the_kind_of_its_column() -> None:
    cases: list[tuple[CellValue, ColumnKind, str]] = [
        (None, "bytes", "–"), (3 * 2**30, "bytes", "3.00 GiB"), (15_608_200_168, "count", "15.61 G"),
        (6.64e12, "flops", "6.64 TFLOP"), (0.0447, "seconds", "44.7 ms"), (123.4, "seconds", "123 s"),
        ((2.0, 1.5, 3.0), "seconds", "2 s (1.5 s to 3 s)"), (0.98765, "ratio", "0.988"),
        ((0.9531, 1.0814), "ratio", "0.953 to 1.081"), ((0.495, 0.0204), "share", "49.5% ± 2.0"),
        ((1.5, 0.25), "number", "1.500 ± 0.250"), (0.648, "share", "64.8%"), (48.3, "times", "48×"),
        (1.04, "times", "1.0×"), (9933, "integer", "9,933"), ("none", "integer", "none"),
    ]  # fmt: skip
    for value, kind, text in cases:
        assert format_value(value, kind) == text


def test_page_markdown_and_json_agree(gallery_folder: Path, small: Document) -> None:
    on_page = cells(gallery_folder / "index.html")
    assert set(on_page) == {table.key for table in small.tables}
    lines = (gallery_folder / "README.md").read_text(encoding="utf-8").splitlines()
    for own in small.tables:
        kinds = [column.kind for column in own.columns]
        for row, texts in zip((*own.rows, *own.foot), on_page[own.key], strict=True):
            assert texts == [format_value(value, kind) for value, kind in zip(row, kinds, strict=True)]
    assert sum(line.startswith("| ") for line in lines) == sum(
        len(own.rows) + len(own.foot) + 1 for own in small.tables
    )
    assert "\n".join(lines) + "\n" == markdown.render_markdown(small)


def test_every_table_and_picture_has_its_provenance(gallery_folder: Path, small: Document) -> None:
    parts = [part for section in small.sections for part in section.parts]
    page = Page((gallery_folder / "index.html").read_text(encoding="utf-8"))
    lines = [" ".join(text.split()) for _, attributes, text in page.all("p") if attributes.get("class") == "provenance"]
    assert len(lines) == len(parts) + 1
    text = (gallery_folder / "README.md").read_text(encoding="utf-8")
    for part, line in zip(parts, lines, strict=False):
        assert part.made is not None
        assert f"{part.how} {part.made.command}, {part.made.time_utc}" in line
        assert f"{part.how} `{part.made.command}`, {part.made.time_utc}" in text


def test_table_of_contents_links_to_every_section(gallery_folder: Path, small: Document) -> None:
    page = Page((gallery_folder / "index.html").read_text(encoding="utf-8"))
    names = [attributes["id"] for _, attributes, _ in page.elements if "id" in attributes]
    assert len(names) == len(set(names))
    links = [(str(attributes["href"]), text) for _, attributes, text in page.all("a")]
    assert links == [(f"#{section.key}", section.title) for section in small.sections]
    assert {link[1:] for link, _ in links} <= set(names)
    assert all(str(attributes["src"]).startswith("data:image/png") for _, attributes, _ in page.all("img"))
    assert len(page.all("img")) == len(small.pictures) >= 10
    assert all(len(str(attributes["alt"])) > 30 for _, attributes, _ in page.all("img"))
    assert (gallery_folder / "index.html").stat().st_size < 4 * 2**20
    assert len(page.all("caption")) == len(page.all("table"))


def test_malicious_name_is_escaped_in_markdown(gallery_folder: Path) -> None:
    text = (gallery_folder / "README.md").read_text(encoding="utf-8")
    assert MALICIOUS not in text
    assert "&lt;script&gt;alert" in text


def test_pictures_of_the_markdown_are_in_its_folder(gallery_folder: Path) -> None:
    text = (gallery_folder / "README.md").read_text(encoding="utf-8")
    named = re.findall(r"\]\(([^)]+\.svg)\)", text)
    assert sorted(named) == sorted(path.name for path in gallery_folder.glob("*.svg"))
    assert all("<svg" in (gallery_folder / name).read_text(encoding="utf-8") for name in named)


def test_figures_equal_those_of_the_planner(small: Document) -> None:
    spec, cluster = preset("vit-tiny/56"), load_cluster("2xRTX4090")
    glance = [row for row in table(small, "glance-table") if row["model"] == "vit-tiny/56"]
    for row, point in zip(glance, best_points(spec, cluster, BF16), strict=True):
        assert (row["operator"], row["parameters"]) == (point.operator, point.parameters)
        assert row["device memory of a rank"] == point.device_bytes
        assert row["step (interval)"] == (point.likely_s, point.low_s, point.high_s)
    full = table(small, "scaling-table")
    assert [row["size"] for row in full if row["operator"] == "attention"] == [192, 12288]
    assert full[0]["device memory of a rank"] == glance[0]["device memory of a rank"]
    assert "38.53 M parameters" in small.sections[0].text[0]


def test_sizes_that_do_not_fit_are_marked() -> None:
    spec, cluster = preset("vit-large/16"), load_cluster("1xRTX4090")
    none = best_point(spec, "full Translution", cluster, BF16)
    assert none.plan is None and none.device_bytes is None and none.likely_s is None
    assert none.reason and "GiB on the device, 22.07 GiB usable" in none.reason
    fits = best_point(override(spec, operator="attention"), "attention", cluster, BF16)
    points = [GrowthPoint(axis="depth", value=24, best=point) for point in (none, fits)]
    section = scaling_section(points, "vit-large/16", cluster, "bf16", MADE)
    memory, time, rows = section.parts
    assert isinstance(rows, Table)
    assert str(rows.rows[0][-1]).startswith("nothing fits: ZeRO-3")
    for picture in (memory, time):
        assert "full Translution does not fit at 24" in str(picture.model_dump()["spec"]["description"])
        assert '"shape": "cross"' in json.dumps(picture.model_dump()["spec"])


def test_node_axis_replaces_the_nodes_of_the_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("translution.planner.analysis.growth.NODE_COUNTS", (2,))
    points = list(growth_points(preset("vit-tiny/56"), load_cluster("4x1xH100"), BF16, axes=("nodes",)))
    assert [point.best.cluster for point in points] == ["2x1xH100"] * 3
    assert [point.best.samples for point in points] == [16] * 3


def test_interval_includes_the_likely_time(small: Document) -> None:
    for row in table(small, "scaling-table"):
        if isinstance(step := row["step (interval)"], tuple):
            likely, low, high = step
            assert low <= likely <= high


def test_experiment_section_shows_the_recorded_results(tmp_path: Path) -> None:
    result = experiment_folder(tmp_path / "a" / "shift")
    experiment_folder(tmp_path / "a" / "language", "language", quick=True)
    language, shift = map(experiment_section, load_results(tmp_path / "a"))
    assert language.title == "Experiment: language" and any("quick run" in text for text in language.text)
    assert not any("quick run" in text for text in shift.text)
    rows = shift.parts[0]
    assert isinstance(rows, Table)
    means = {row[0]: row[2:] for row in rows.rows}
    for own in result.summaries():
        column = [column.title for column in rows.columns[2:]].index(
            f"trained {kind_name(own.train)}, tested {kind_name(own.test)}"
        )
        assert means[own.variant][column] == (own.mean, own.deviation)
    assert language.parts[0].model_dump()["columns"][2]["kind"] == "number"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "cluster", "constraints"),
    [
        ("vit-base/16", "2x8xH100", SearchConstraints()),
        ("gpt-large/1024", "8xH100", SearchConstraints(micro_batch=1, gradient_accumulation_steps=2)),
    ],
    ids=["no offload", "offload"],
)
def test_command_of_a_plan_reproduces_it(
    model: str, cluster: str, constraints: SearchConstraints, tmp_path: Path, capsys: Captured
) -> None:
    plan = search_plan(preset(model), load_cluster(cluster), BF16, constraints).plan
    command = plan_command(plan)
    assert command is not None
    words = shlex.split(command.replace("PLAN", str(tmp_path / "plan")))
    assert run(words[1:]) == 0, capsys.readouterr().err
    assert load_plan(tmp_path / "plan") == plan


def test_plan_that_flags_cannot_express_has_no_command(tmp_path: Path) -> None:
    plan = plan_folder(tmp_path / "plan")
    assert plan_command(plan) is None
    known = search_plan(preset("vit-tiny/56"), load_cluster("1xH100"), BF16).plan
    assert plan_command(known) is not None
    changed = known.training.model_copy(update={"learning_rate": 0.5})
    assert plan_command(known.model_copy(update={"training": changed})) is None


BAD: list[tuple[str, list[str]]] = [
    ("nothing to report", []),
    ("model: 'vit-bose/16' is not allowed", ["--model", "vit-bose/16"]),
    ("cluster: GPU 'H10' is not allowed", ["--model", "vit-tiny/56", "--cluster", "8xH10"]),
    ("--cluster: 'cpu:1' is not allowed with --compare", ["--compare", "vit-tiny/56", "--cluster", "cpu:1"]),
    ("FOLDER/none.json: no such file", ["--accuracy", "FOLDER/none.json"]),
    ("FOLDER/torn.json: not valid JSON", ["--step-time", "FOLDER/torn.json"]),
    ("rows.0.predicted_s: 'soon' is not allowed", ["--step-time", "FOLDER/bad.json"]),
    ("unknown key 'colour'", ["--step-time", "FOLDER/unknown.json"]),
    ("FOLDER/operator.json: command: is required", ["--benchmarks", "FOLDER"]),
    ("--benchmarks: 'FOLDER/empty' is not allowed", ["--benchmarks", "FOLDER/empty"]),
    ("--experiments: 'FOLDER/empty' is not allowed", ["--experiments", "FOLDER/empty"]),
    ("trials: must be of every variant, task and test", ["--experiments", "FOLDER/experiments"]),
    ("--png: is not allowed with 0 plans: must be exactly one", ["--model", "vit-tiny/56", "--png", "FOLDER/x.png"]),
    ("--markdown: 'FOLDER/x.txt' is not allowed: must end in .md", ["FOLDER/plan", "--markdown", "FOLDER/x.txt"]),
    ("--data: 'FOLDER/no/x.json' is not allowed", ["FOLDER/plan", "--data", "FOLDER/no/x.json"]),
]


@pytest.mark.parametrize(("message", "arguments"), BAD, ids=[entry[0][:30] for entry in BAD])
def test_invalid_input_is_one_error_line_and_writes_nothing(
    message: str, arguments: list[str], tmp_path: Path, capsys: Captured, root: Path
) -> None:
    (tmp_path / "empty").mkdir()
    plan_folder(tmp_path / "plan")
    known = json.loads((root / "reports" / "step_time.json").read_text(encoding="utf-8"))
    (tmp_path / "torn.json").write_text("{")
    (tmp_path / "unknown.json").write_text(json.dumps(known | {"colour": 1}))
    known["rows"][0]["predicted_s"] = "soon"
    (tmp_path / "bad.json").write_text(json.dumps(known))
    (tmp_path / "operator.json").write_text("{}")
    result = experiment_folder(tmp_path / "experiments" / "shift")
    short = result.model_copy(update={"trials": result.trials[:1]})
    (tmp_path / "experiments" / "shift" / "result.json").write_text(short.model_dump_json())
    before = sorted(tmp_path.rglob("*"))
    words = [text.replace("FOLDER", str(tmp_path)) for text in arguments]
    assert run(["report", *words, "--out", str(tmp_path / "x.html")]) == 2
    error = capsys.readouterr().err
    assert message.replace("FOLDER", str(tmp_path)) in error
    assert error.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_two_plans_have_separate_sections(tmp_path: Path) -> None:
    folders = tmp_path / "one", tmp_path / "two"
    for folder in folders:
        plan_folder(folder, name=folder.name)
    builder = ReportBuilder(ReportRequest(plans=folders), MADE, "x.html")
    document = builder.document(builder.plans())
    titles = [section.title for section in document.sections]
    assert "Memory breakdown: one on cpu:1" in titles and "Memory breakdown: two on cpu:1" in titles
    parts = [part for section in document.sections for part in section.parts]
    keys = [section.key for section in document.sections] + [part.key for part in parts]
    assert len(keys) == len(set(keys)) >= 12
    assert {part.made.command for part in parts if part.made is not None} == {
        f"translution report {folder} --out x.html" for folder in folders
    }


@pytest.mark.slow
def test_report_imports_no_torch(tmp_path: Path, root: Path) -> None:
    recorded = root / "reports" / "step_time.json"
    program = (
        "import sys\nfrom translution.cli.main import run\n"
        f"assert run(['report', '--step-time', r'{recorded}', '--out', r'{tmp_path}/x.html']) == 0\n"
        "print(*[name for name in ('torch', 'deepspeed') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == ""
