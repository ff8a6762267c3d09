"""The section on published runs: every run is a dot, and the summary is that of the record."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from translution.reports.inputs.benchmark_records import PublicRuns, load_record
from translution.reports.render.document import Picture, Table
from translution.reports.sections.public_runs import public_section


def test_every_published_run_is_in_the_picture_and_counted(root: Path) -> None:
    found = load_record(PublicRuns, root / "reports" / "public.json")
    summary, picture, fits, figures = public_section(found).parts
    assert isinstance(summary, Table)
    assert isinstance(picture, Picture)
    assert isinstance(fits, Table)
    assert [row[1] for row in fits.rows] == ["fits", "out of memory", "out of memory"]
    assert isinstance(figures, Table)
    line, intervals, dots = picture.spec["layer"]
    values = picture.spec["datasets"][dots["data"]["name"]]
    assert [(value["published"], value["predicted"]) for value in values] == [
        (row.published_s, row.predicted_s) for row in found.rows
    ]
    assert intervals["data"] == dots["data"]
    for value in values:
        assert value["low"] <= value["predicted"] <= value["high"]
    for axis in ("x", "y"):
        assert dots["encoding"][axis]["scale"]["type"] == "log"
    # The dashed line is where both are equal.
    assert all(end["published"] == end["predicted"] for end in picture.spec["datasets"][line["data"]["name"]])
    counted = {row[0]: row[1] for row in summary.rows}
    assert counted.pop("all") == 104 == len(found.rows)
    assert counted == Counter(row.gpu for row in found.rows)
    assert len(figures.rows) == len(found.figures) == 5
