"""``translution report``."""

from __future__ import annotations

import shlex
from pathlib import Path

from translution.planner.errors import InputError, MissingPackageError
from translution.planner.files import write_bytes
from translution.planner.provenance import provenance
from translution.planner.units import format_bytes

from .output import print_json


def _check(option: str, path: Path, suffix: str) -> None:
    if path.suffix.lower() != suffix:
        raise InputError(f"{option}: {str(path)!r} is not allowed: must end in {suffix}")
    if not path.parent.is_dir():
        raise InputError(f"{option}: {str(path)!r} is not allowed: {path.parent} must be a folder")


def run_report(folder: Path, out: Path, png: Path | None, svg: Path | None, *, as_json: bool) -> None:
    """Write the report of a plan or run, and its timeline as a picture.

    Args:
        folder: a plan folder, or a run folder.
        out: the page to write.
        png: the picture to write, or None.
        svg: likewise.
        as_json: print what was written as JSON.
    """
    targets = {"--out": (out, ".html"), "--png": (png, ".png"), "--svg": (svg, ".svg")}
    for option, (path, suffix) in targets.items():
        if path is not None:
            _check(option, path, suffix)
    try:
        from translution.reports import vega
        from translution.reports.html import render
        from translution.reports.plan_report import report_plan
    except ImportError as error:
        raise MissingPackageError(f"{error.name} is missing: pip install 'translution-scale[report]'") from None
    options = [(option, str(path)) for option, (path, _) in targets.items() if path is not None]
    command = shlex.join(["translution", "report", str(folder), *(text for pair in options for text in pair)])
    made = provenance(command, ("pydantic", "altair", "vl-convert-python"))
    report = report_plan(folder)
    written = {out: render(report, made).encode()}
    if png is not None:
        written[png] = vega.png(report.picture)
    if svg is not None:
        written[svg] = vega.svg(report.picture).encode()
    for path, content in written.items():
        write_bytes(path, content)
    if as_json:
        print_json({"files": {str(path): len(content) for path, content in written.items()}})
        return
    for path, content in written.items():
        print(f"wrote {path} ({format_bytes(len(content))})")
