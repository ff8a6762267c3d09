"""The report of a plan: one self-contained page that makes no requests and shows the figures of plan and run."""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import re
import sys
from pathlib import Path

import pytest
from helpers.html_page import Page
from helpers.report_folders import MALICIOUS, plan_folder, run_folder

from translution.cli.main import run
from translution.planner.plans.plan import Plan, load_plan
from translution.reports.inputs.prediction import breakdown_rows, timelines_of

Captured = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def page(report_page: Path) -> Page:
    return Page(report_page.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def plan(report_page: Path) -> Plan:
    return load_plan(report_page.parent / "plan")


def test_page_loads_nothing_from_other_files(page: Page) -> None:
    links = {"src", "srcset", "href", "data", "poster", "action", "formaction", "background", "xlink:href", "ping"}
    found = 0
    for tag, attributes, _ in page.elements:
        for name, value in attributes.items():
            if name in links:
                assert str(value).startswith("data:" if tag != "a" else "#"), (tag, name)
                found += 1
    assert found >= 2
    (_, _, style), *others = page.all("style")
    assert not others
    assert not re.search(r"url\(|@import", style)
    assert not page.all("link", "iframe", "object", "embed", "base", "form")


def test_malicious_name_is_escaped(page: Page) -> None:
    assert page.all("h1")[0][2] == f"{MALICIOUS} on cpu:1"
    assert page.all("title")[0][2] == f"{MALICIOUS} on cpu:1: memory report"
    assert {str(attributes.get("src"))[:22] for _, attributes, _ in page.all("img")} == {"data:image/png;base64,"}
    assert not [name for _, attributes, _ in page.elements for name in attributes if name.startswith("on")]
    scripts = [(attributes, text) for _, attributes, text in page.all("script")]
    assert [text for attributes, text in scripts if "type" not in attributes and "alert" in text] == []
    # Chart specifications and colours are JSON data blocks.
    blocks = [json.loads(text) for attributes, text in scripts if attributes.get("type") == "application/json"]
    assert MALICIOUS in blocks[0]["title"]["text"]
    assert "A rank needs at most" in page.all("header")[0][2]


def test_content_security_policy_allows_only_the_scripts_of_the_page(page: Page) -> None:
    (policy,) = (attributes["content"] for _, attributes, _ in page.all("meta") if "http-equiv" in attributes)
    assert policy is not None
    rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
    assert rules["default-src"] == rules["form-action"] == rules["base-uri"] == "'none'"
    assert rules["img-src"] == "data:"
    scripts = [text for _, attributes, text in page.all("script") if "type" not in attributes]
    hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in scripts]
    assert rules["script-src"].split() == [f"'sha256-{value}'" for value in hashes]
    assert len(hashes) == 2


def test_the_page_is_accessible(page: Page) -> None:
    assert page.all("html")[0][1]["lang"] == "en"
    levels = [int(tag[1]) for tag, _, _ in page.all("h1", "h2", "h3", "h4")]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    assert len(page.all("caption")) == len(page.all("table")) >= 3
    assert all(attributes.get("scope") in ("row", "col") for _, attributes, _ in page.all("th"))
    for _, attributes, _ in page.all("img"):
        assert "Peak" in str(attributes["alt"]) or " of each step. 002: " in str(attributes["alt"])
    names = {attributes["id"] for _, attributes, _ in page.elements if "id" in attributes}
    assert {attributes["aria-labelledby"] for _, attributes, _ in page.all("section")} <= names
    # Scrollable areas are reachable by keyboard and have a name.
    scrolls = [attributes for _, attributes, _ in page.all("div") if attributes.get("class") == "scroll"]
    assert len(scrolls) == len(page.all("table", "figure"))
    assert all(attributes["tabindex"] == "0" and attributes["aria-label"] for attributes in scrolls)


def test_every_item_of_the_breakdown_is_shown_to_the_byte(page: Page, plan: Plan) -> None:
    shown = [int(str(attributes["value"])) for _, attributes, _ in page.all("data")]
    rows = breakdown_rows(plan.prediction)
    assert {row["bytes"] for row in rows} | {peak.bytes for peak in plan.prediction.peaks} <= set(shown)
    cells = {text for _, _, text in page.all("td", "th")}
    assert {row[key] for row in rows for key in ("name", "phase", "formula", "source")} <= cells | {
        part for cell in cells for part in cell.split("; ")
    }


def test_items_of_each_phase_add_up_to_its_peak(plan: Plan) -> None:
    rows = breakdown_rows(plan.prediction)
    for tier, phase in {(row["tier"], row["phase"]) for row in rows}:
        own = [row for row in rows if (row["tier"], row["phase"]) == (tier, phase)]
        assert {row["peak_bytes"] for row in own} == {sum(row["bytes"] for row in own)}


def test_peak_of_the_timeline_equals_the_prediction(plan: Plan) -> None:
    step = ("forward", "backward", "optimizer step")
    assert timelines_of(plan)["host"].peak_bytes == max(plan.prediction.bytes_of(phase) for phase in step)


def test_newest_measured_run_is_compared_with_the_prediction(page: Page, plan: Plan) -> None:
    captions = [text for _, _, text in page.all("caption")]
    assert any(caption.endswith("002") for caption in captions)
    shown = [int(str(attributes["value"])) for _, attributes, _ in page.all("data")]
    assert plan.prediction.peak_bytes + 1000 in shown
    assert f"{plan.prediction.peak_bytes / (plan.prediction.peak_bytes + 1000):.3f}" in {
        text for _, _, text in page.all("td")
    }
    assert "62.50%" in page.all("body")[0][2]
    curve = next(json.loads(text) for _, attributes, text in page.all("script") if attributes.get("id") == "curve")
    assert [2.5, 2.0, 1.5, 1.0] in [[row["y"] for row in rows] for rows in curve["datasets"].values()]


def test_every_table_and_picture_has_its_provenance(page: Page, report_page: Path) -> None:
    lines = [" ".join(text.split()) for _, attributes, text in page.all("p") if attributes.get("class") == "provenance"]
    assert len(lines) == len(page.all("table", "figure")) + 1
    for line in lines:
        assert re.search(r"translution (report|train) .*, \d{4}-\d\d-\d\dT[\d:+]+, \d+ cores? of .*; Python 3", line)
    # The measured memory, the table of the run, and its pictures: loss, throughput and learning rate.
    assert sum("translution train <PLAN>" in line and "torch" in line for line in lines) == 5
    assert any(
        f"translution report {report_page.parent / 'plan'} --out {report_page}, " in line and "altair" in line
        for line in lines
    )


@pytest.mark.slow
def test_a_report_of_an_earlier_versions_run_without_measurement_shows_its_steps_and_is_drawn(
    tmp_path: Path, capsys: Captured
) -> None:
    plan_folder(tmp_path / "plan")
    path = run_folder(tmp_path / "plan", "001")
    (path / "memory" / "rank_0.json").unlink()
    lines = (path / "metrics.jsonl").read_text().splitlines()
    (path / "metrics.jsonl").write_text("\n".join(lines[1:]))
    files = [str(tmp_path / f"x.{suffix}") for suffix in ("html", "png", "svg")]
    drawn = ["--png", files[1], "--svg", files[2]]
    for folder, more in ((tmp_path / "plan", drawn), (path, [])):
        assert run(["report", str(folder), "--out", files[0], "--json", "--force", *more]) == 0
        sizes = json.loads(capsys.readouterr().out)["files"]
        assert sizes == {name: Path(name).stat().st_size for name in (files if more else files[:1])}
        text = Path(files[0]).read_text(encoding="utf-8")
        assert "Memory breakdown" in text and "Training: run 001" in text
        assert "Predicted and measured memory" not in text
        assert "not recorded by the run" in text
    assert Path(files[1]).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert "host memory" in Path(files[2]).read_text(encoding="utf-8")


BAD: list[tuple[str, list[str]]] = [
    ("is not a plan folder", ["FOLDER/empty", "--out", "FOLDER/x.html"]),
    ("--out: 'FOLDER/x.json' is not allowed: must end in .html", ["FOLDER/plan", "--out", "FOLDER/x.json"]),
    (
        "--out: 'FOLDER/no/x.html' is not allowed: FOLDER/no must be a folder",
        ["FOLDER/plan", "--out", "FOLDER/no/x.html"],
    ),
    ("--png: 'FOLDER/x.jpg' is not allowed", ["FOLDER/plan", "--out", "FOLDER/x.html", "--png", "FOLDER/x.jpg"]),
    ("--svg: 'FOLDER/x' is not allowed", ["FOLDER/plan", "--out", "FOLDER/x.html", "--svg", "FOLDER/x"]),
    ("rank_0.json: not valid JSON", ["FOLDER/damaged", "--out", "FOLDER/x.html"]),
    ("metrics.jsonl: line 1: not valid JSON", ["FOLDER/torn/runs/001", "--out", "FOLDER/x.html"]),
    ("metrics.jsonl: line 1: not valid JSON: nested too", ["FOLDER/deep/runs/001", "--out", "FOLDER/x.html"]),
]


@pytest.mark.parametrize(("message", "arguments"), BAD, ids=[entry[0][:30] for entry in BAD])
def test_invalid_input_is_one_error_line_and_writes_nothing(
    message: str, arguments: list[str], tmp_path: Path, capsys: Captured
) -> None:
    (tmp_path / "empty").mkdir()
    for name in ("plan", "damaged", "torn", "deep"):
        plan_folder(tmp_path / name)
    (run_folder(tmp_path / "damaged", "001") / "memory" / "rank_0.json").write_text("{")
    (run_folder(tmp_path / "torn", "001") / "metrics.jsonl").write_text("{\n{}\n")
    (run_folder(tmp_path / "deep", "001") / "metrics.jsonl").write_text(100_000 * "[" + "\n{}\n")
    before = sorted(tmp_path.rglob("*"))
    assert run(["report", *(text.replace("FOLDER", str(tmp_path)) for text in arguments)]) == 2
    error = capsys.readouterr().err
    assert message.replace("FOLDER", str(tmp_path)) in error
    assert error.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_missing_package_is_named_with_its_install_command(
    tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan_folder(tmp_path / "plan")
    for name in [name for name in sys.modules if name.startswith("translution.reports")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "altair", None)
    assert run(["report", str(tmp_path / "plan"), "--out", str(tmp_path / "x.html")]) == 2
    assert "altair is missing: pip install 'translution-scale[report]'" in capsys.readouterr().err
    assert not (tmp_path / "x.html").exists()


def test_help_has_examples(capsys: Captured) -> None:
    assert run(["report", "--help"]) == 0
    assert "translution report plans/small --out" in " ".join(capsys.readouterr().out.split())
