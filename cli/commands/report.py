"""``translution report``."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from translution.planner.common.errors import InputError, MissingPackageError
from translution.planner.common.files import write_bytes
from translution.planner.common.provenance import provenance
from translution.planner.common.units import format_bytes
from translution.planner.config.loading import load_model_spec
from translution.planner.hardware.cluster import load_cluster

from ..options import JsonOption
from ..output import print_json
from . import app

if TYPE_CHECKING:
    from translution.reports.builder import ReportRequest
    from translution.reports.render.document import Document
    from translution.reports.sections.plan import PlanReport


@dataclass(frozen=True, slots=True)
class ReportInputs:
    """What the user wants in a report."""

    folders: Sequence[Path]
    models: Sequence[str]
    compared: Sequence[str]
    scaling: str | None
    cluster: str
    experiments: Path | None
    accuracy: Path | None
    step_time: Path | None
    benchmarks: Path | None

    def words(self) -> Iterator[str]:
        """As a user would type them."""
        yield from map(str, self.folders)
        for option, values in (("--model", self.models), ("--compare", self.compared)):
            for value in values:
                yield from (option, value)
        if self.scaling is not None:
            yield from ("--scaling", self.scaling)
        if self.models or self.compared or self.scaling is not None:
            yield from ("--cluster", self.cluster)
        files = {
            "--accuracy": self.accuracy,
            "--step-time": self.step_time,
            "--experiments": self.experiments,
            "--benchmarks": self.benchmarks,
        }
        for option, path in files.items():
            if path is not None:
                yield from (option, str(path))

    def request(self) -> ReportRequest:
        """The same with its models and cluster read.

        Raises:
            InputError: for an unknown name, or a bad file.
        """
        from translution.reports.builder import ReportRequest

        planned = self.models or self.compared or self.scaling is not None
        return ReportRequest(
            plans=tuple(self.folders),
            models={name: load_model_spec(name) for name in self.models},
            compared={name: load_model_spec(name) for name in self.compared},
            scaled=None if self.scaling is None else (self.scaling, load_model_spec(self.scaling)),
            cluster=(self.cluster, load_cluster(self.cluster)) if planned else None,
            experiments=self.experiments,
            accuracy=self.accuracy,
            step_time=self.step_time,
            benchmarks=self.benchmarks,
        )


@dataclass(frozen=True, slots=True)
class ReportOutputs:
    """Files to write; all but the page may be None."""

    page: Path
    png: Path | None
    svg: Path | None
    markdown: Path | None
    data: Path | None

    def named(self) -> dict[str, tuple[Path, str]]:
        """By option: those that are wanted, with the suffix that they must have."""
        every = {
            "--out": (self.page, ".html"),
            "--png": (self.png, ".png"),
            "--svg": (self.svg, ".svg"),
            "--markdown": (self.markdown, ".md"),
            "--data": (self.data, ".json"),
        }
        return {option: (path, suffix) for option, (path, suffix) in every.items() if path is not None}


def _check(option: str, path: Path, suffix: str) -> None:
    if path.suffix.lower() != suffix:
        raise InputError(f"{option}: {str(path)!r} is not allowed: must end in {suffix}")
    if not path.parent.is_dir():
        raise InputError(f"{option}: {str(path)!r} is not allowed: {path.parent} must be a folder")


def _check_all(inputs: ReportInputs, outputs: ReportOutputs) -> None:
    for option, (path, suffix) in outputs.named().items():
        _check(option, path, suffix)
    if not list(inputs.words()):
        raise InputError("nothing to report: give a plan or run folder, --model, or another of the options")
    for option in ("--png", "--svg"):
        if option in outputs.named() and len(inputs.folders) != 1:
            raise InputError(f"{option}: is not allowed: is of one plan's memory, not of {len(inputs.folders)}")


def _contents(document: Document, plans: Sequence[PlanReport], outputs: ReportOutputs) -> dict[Path, bytes]:
    """What is to be written where."""
    from translution.reports.render import html, markdown, vega

    written = {outputs.page: html.render_html(document).encode()}
    if outputs.png is not None:
        written[outputs.png] = vega.png(plans[0].picture)
    if outputs.svg is not None:
        written[outputs.svg] = vega.svg(plans[0].picture).encode()
    if outputs.markdown is not None:
        for name, text in markdown.picture_files(document).items():
            written[outputs.markdown.with_name(name)] = text.encode()
        written[outputs.markdown] = markdown.render_markdown(document).encode()
    if outputs.data is not None:
        written[outputs.data] = (document.model_dump_json(indent=1) + "\n").encode()
    return written


@app.command(
    "report",
    epilog="Examples: **translution report plans/small --out small.html** · **translution report plans/small/runs/001 "
    "--out run.html --png timeline.png** · **translution report --model vit-base/16 --scaling vit-small/16 --cluster "
    "8xH100 --out costs.html --markdown costs.md**",
)
def report_cli(
    out: Annotated[Path, typer.Option(help="HTML page to write; it needs no network.")],
    folders: Annotated[
        list[Path] | None, typer.Argument(metavar="[PLAN_OR_RUN]...", help="Plan folders or run folders.")
    ] = None,
    model: Annotated[
        list[str] | None, typer.Option(help="Preset or file whose costs and best plans are shown; repeatable.")
    ] = None,
    compare: Annotated[
        list[str] | None, typer.Option(help="Preset or file whose operators are compared on GPUs; repeatable.")
    ] = None,
    scaling: Annotated[
        str | None, typer.Option(help="Preset or file from which model sizes and node counts are scaled up.")
    ] = None,
    cluster: Annotated[
        str, typer.Option(help="Cluster for the three options above, as `translution plan` takes it.")
    ] = "8xH100",
    experiments: Annotated[Path | None, typer.Option(help="Folder that `translution experiment` wrote.")] = None,
    accuracy: Annotated[Path | None, typer.Option(help="accuracy.json of benchmarks/accuracy.py.")] = None,
    step_time: Annotated[Path | None, typer.Option(help="step_time.json of benchmarks/step_time.py.")] = None,
    benchmarks: Annotated[Path | None, typer.Option(help="Folder with operator.json and planner.json.")] = None,
    png: Annotated[Path | None, typer.Option(help="Also write a plan's memory timeline as PNG.")] = None,
    svg: Annotated[Path | None, typer.Option(help="Also write a plan's memory timeline as SVG.")] = None,
    markdown: Annotated[
        Path | None, typer.Option(help="Also write Markdown, with its pictures as SVG files next to it.")
    ] = None,
    data: Annotated[Path | None, typer.Option(help="Also write all content of the report as JSON.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Write a page about plans, runs, models, experiments and benchmarks."""
    inputs = ReportInputs(
        folders=folders or (),
        models=model or (),
        compared=compare or (),
        scaling=scaling,
        cluster=cluster,
        experiments=experiments,
        accuracy=accuracy,
        step_time=step_time,
        benchmarks=benchmarks,
    )
    _report(inputs, ReportOutputs(out, png, svg, markdown, data), as_json=as_json)


def _report(inputs: ReportInputs, outputs: ReportOutputs, *, as_json: bool) -> None:
    """Write a report, as a page and as whatever else is wanted.

    Args:
        inputs: what it is to hold.
        outputs: the files.
        as_json: print what was written as JSON.
    """
    _check_all(inputs, outputs)
    try:
        from translution.reports.builder import PACKAGES, ReportBuilder
    except ImportError as error:
        raise MissingPackageError(f"{error.name} is missing: pip install 'translution-scale[report]'") from None
    options = [word for option, (path, _) in outputs.named().items() for word in (option, str(path))]
    made = provenance(shlex.join(["translution", "report", *inputs.words(), *options]), PACKAGES)
    builder = ReportBuilder(inputs.request(), made, str(outputs.page))
    plans = builder.plans()
    written = _contents(builder.document(plans), plans, outputs)
    for path, content in written.items():
        write_bytes(path, content)
    if as_json:
        print_json({"files": {str(path): len(content) for path, content in written.items()}})
        return
    for path, content in written.items():
        print(f"wrote {path} ({format_bytes(len(content))})")
