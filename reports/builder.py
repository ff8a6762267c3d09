"""Builds a report from a request: plans, models, comparisons, measurements and experiments in one document."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from translution.planner.analysis import comparison_rows, growth_points, scale_points, thresholds
from translution.planner.common import InputError, Provenance, check_new_file, make_provenance, write_bytes
from translution.planner.config import GPU_PRECISION, TrainingSpec

from .inputs.benchmark_records import Accuracy, PublicRuns, StepTimes, load_record
from .inputs.gpu_record import load_gpu_check
from .inputs.training_runs import read_runs
from .render.document import Document, Section
from .render.html import render_html
from .render.markdown import picture_files, render_markdown
from .render.vega import png, svg
from .request import ReportRequest
from .sections.accuracy import accuracy_section, step_time_section
from .sections.benchmarks import benchmark_sections
from .sections.comparison import comparison_section
from .sections.experiment import experiment_section, load_results
from .sections.gpu import gpu_section
from .sections.model_costs import costs_section, overview_section
from .sections.plan import PlanReport, report_plan, verdict
from .sections.public_runs import public_section
from .sections.scaling import scaling_section
from .sections.snapshot import snapshot_section
from .sections.traffic import traffic_section
from .sections.training import training_section

PACKAGES = ("pydantic", "altair", "vl-convert-python")
"""Packages whose versions the provenance of a report names."""


@dataclass(frozen=True, slots=True)
class ReportFiles:
    """Files to write. All but the page are optional."""

    page: Path
    """HTML page."""
    png: Path | None = None
    """Memory timeline of the single plan."""
    svg: Path | None = None
    """Memory timeline of the single plan."""
    markdown: Path | None = None
    """Markdown; its pictures are SVG files next to it."""
    data: Path | None = None
    """JSON with all content of the report."""
    force: bool = False
    """Whether files that exist are replaced; a picture of the Markdown only if that Markdown links to it."""

    def by_option(self) -> dict[str, tuple[Path, str]]:
        """Return path and required suffix of each requested file, by its option of `translution report`."""
        every = {
            "--out": (self.page, ".html"),
            "--png": (self.png, ".png"),
            "--svg": (self.svg, ".svg"),
            "--markdown": (self.markdown, ".md"),
            "--data": (self.data, ".json"),
        }
        return {option: (path, suffix) for option, (path, suffix) in every.items() if path is not None}


def _titled(sections: Iterable[Section], name: str) -> Iterator[Section]:
    """Yield the sections with the name of their plan in the title."""
    for section in sections:
        yield section.model_copy(update={"title": f"{section.title}: {name}"})


class ReportBuilder:
    """Makes the sections of a report, each with the command that reproduces it alone.

    Args:
        request: contents of the report.
        made: provenance of the complete report.
        page: name of the HTML page, for the commands.
    """

    def __init__(self, request: ReportRequest, made: Provenance, page: str) -> None:
        self._request, self._made, self._page = request, made, page
        self._training = TrainingSpec(precision=GPU_PRECISION, data="synthetic")

    def _made_by(self, *words: str) -> Provenance:
        return self._made.model_copy(update={"command": shlex.join(["translution", *words])})

    def _made_by_report(self, *words: str) -> Provenance:
        return self._made_by("report", *words, "--out", self._page)

    def _about_models(self) -> list[Section]:
        request = self._request
        if not request.models:
            return []
        name, cluster = request.required_cluster()
        words = [word for model in request.models for word in ("--model", model)]
        made, specs = self._made_by_report(*words, "--cluster", name), tuple(request.models.values())
        return [overview_section(specs, cluster, self._training, made), costs_section(specs, self._training, made)]

    def _comparison(self) -> list[Section]:
        request = self._request
        if not request.compared:
            return []
        name, cluster = request.required_cluster()
        if cluster.gpu is None:
            raise InputError(f"--cluster: {name!r} is not allowed with --compare: must be of a GPU of the catalog")
        specs = tuple(request.compared.values())
        rows = [row for spec in specs for row in comparison_rows(spec, cluster.gpu, self._training)]
        limits = tuple(thresholds(specs[0], cluster.gpu, self._training))
        points = tuple(scale_points(specs[0], self._training))
        made = self._made_by("compare", *request.compared, "--gpu", cluster.gpu, "--precision", GPU_PRECISION)
        traffic = traffic_section(specs[0], made)
        return [comparison_section(rows, limits, points, cluster.gpu, made), *([traffic] if traffic else [])]

    def _scaling(self) -> list[Section]:
        if self._request.scaled is None:
            return []
        (name, spec), (cluster_name, cluster) = self._request.scaled, self._request.required_cluster()
        points = tuple(growth_points(spec, cluster, self._training))
        made = self._made_by_report("--scaling", name, "--cluster", cluster_name)
        return [scaling_section(points, name, cluster, GPU_PRECISION, made)]

    def plans(self) -> list[PlanReport]:
        """Return the sections of each plan; in a report with other contents, their titles name the plan.

        Runs of one plan have its sections once.
        """
        reports: list[PlanReport] = []
        for number, folder in enumerate(self._request.plans, start=1):
            found = report_plan(folder, self._made_by_report(str(folder)), f"plan-{number}-" if number > 1 else "")
            if any(found.plan == other.plan for other in reports):
                found = dataclasses.replace(found, sections=())
            elif not self._request.of_one_plan:
                found = dataclasses.replace(found, sections=tuple(_titled(found.sections, found.title)))
            reports.append(found)
        return reports

    def _about_runs(self) -> list[Section]:
        """Return the section on the runs of all folders, in one chart for each figure."""
        runs = read_runs(self._request.plans)
        folders = [str(folder) for folder in self._request.plans]
        return [training_section(runs, self._made_by_report(*folders))] if runs else []

    def _snapshot(self, plans: list[PlanReport]) -> list[Section]:
        """Return the section on the memory snapshot of the single plan, if there is one."""
        request = self._request
        if request.snapshot is None:
            return []
        words = [str(request.plans[0]), "--snapshot", str(request.snapshot)]
        if request.snapshot_steps != 1:
            words += ["--snapshot-steps", str(request.snapshot_steps)]
        made = self._made_by_report(*words)
        return [snapshot_section(plans[0].plan, request.snapshot, request.snapshot_steps, made)]

    def _about_plans(self, plans: list[PlanReport]) -> list[Section]:
        """Return the sections of the plans and their runs: those of one plan begin with its memory."""
        measured = [plan.measured for plan in plans if plan.measured is not None]
        sections = [section for plan in plans for section in plan.sections]
        training = self._about_runs()
        if len(plans) == 1:
            return [*sections[:1], *self._snapshot(plans), *training, *sections[1:], *measured]
        return [*training, *sections, *measured]

    def _recorded(self) -> list[Section]:
        request, sections = self._request, []
        if request.accuracy is not None:
            sections.append(accuracy_section(load_record(Accuracy, request.accuracy)))
        if request.step_time is not None:
            sections.append(step_time_section(load_record(StepTimes, request.step_time)))
        if request.public is not None:
            sections.append(public_section(load_record(PublicRuns, request.public)))
        if request.experiments is not None:
            sections += map(experiment_section, load_results(request.experiments))
        if request.benchmarks is not None:
            sections += benchmark_sections(request.benchmarks)
        if request.gpu is not None:
            sections.append(gpu_section(load_gpu_check(request.gpu)))
        return sections

    def document(self, plans: list[PlanReport]) -> Document:
        """Return the complete report.

        Args:
            plans: result of `plans`.

        Raises:
            InputError: if a file is missing or invalid, or the cluster does not suit.
        """
        # Read the files first: an invalid one is reported before minutes of planning.
        recorded = self._recorded()
        if self._request.of_one_plan:
            (plan,) = plans
            return Document(
                title=plan.title,
                about="memory report",
                text=(verdict(plan.plan),),
                sections=tuple(self._about_plans(plans)),
                made=self._made,
            )
        if self._request.of_plans:
            distinct = {plan.title: verdict(plan.plan) for plan in plans if plan.sections}
            return Document(
                title=f"{len(plans)} plans and runs",
                about="report",
                text=tuple(f"{title}: {text}" for title, text in distinct.items()),
                sections=tuple(self._about_plans(plans)),
                made=self._made,
            )
        sections = self._about_models() + self._comparison() + self._scaling()
        sections += self._about_plans(plans) + recorded
        text = (
            "Full Translution has separate weight matrices for every relation between two tokens: what that costs, "
            "which plans train it with DeepSpeed ZeRO, and how predictions compare with measurements."
        )
        return Document(
            title="Full Translution: costs, plans and measurements",
            about="report",
            text=(text,),
            sections=tuple(sections),
            made=self._made,
        )


def write_report(request: ReportRequest, files: ReportFiles) -> dict[Path, int]:
    """Write a report in all requested formats; write nothing if any part fails or a file may not be replaced.

    Args:
        request: contents of the report.
        files: files to write.

    Returns:
        The size in bytes of every file written, pictures of the Markdown included.

    Raises:
        InputError: if nothing is requested, a path is not allowed, a file exists that may not be replaced, or an input
            is missing or invalid.
    """
    _check_request(request, files)
    options = [word for option, (path, _) in files.by_option().items() for word in (option, str(path))]
    made = make_provenance(shlex.join(["translution", "report", *request.arguments(), *options]), PACKAGES)
    builder = ReportBuilder(request, made, str(files.page))
    plans = builder.plans()
    document = builder.document(plans)
    _check_pictures(document, files)
    contents = _contents(document, plans, files)
    for path, content in contents.items():
        write_bytes(path, content)
    return {path: len(content) for path, content in contents.items()}


def _check_request(request: ReportRequest, files: ReportFiles) -> None:
    for option, (path, suffix) in files.by_option().items():
        if path.suffix.lower() != suffix:
            raise InputError(f"{option}: {str(path)!r} is not allowed: must end in {suffix}")
        check_new_file(path, option, force=files.force)
    if request in (ReportRequest(), ReportRequest(snapshot=request.snapshot)):
        raise InputError("nothing to report: give a plan or run folder, --model, or another of the options")
    if request.snapshot is not None and len(request.plans) != 1:
        raise InputError(f"--snapshot: is not allowed with {len(request.plans)} plans: must be exactly one")
    if request.snapshot is None and request.snapshot_steps != 1:
        raise InputError("--snapshot-steps: is not allowed without --snapshot")
    for option in ("--png", "--svg"):
        if option in files.by_option() and len(request.plans) != 1:
            raise InputError(f"{option}: is not allowed with {len(request.plans)} plans: must be exactly one")


def _check_pictures(document: Document, files: ReportFiles) -> None:
    """Check the files of the Markdown's pictures, whose names the user does not choose.

    Raises:
        InputError: if one exists that is not of the Markdown which is replaced, or another option names it.
    """
    if files.markdown is None:
        return
    linked = files.markdown.read_text(encoding="utf-8", errors="replace") if files.markdown.is_file() else ""
    for name in picture_files(document):
        path = files.markdown.with_name(name)
        if any(path.absolute() == other.absolute() for other, _ in files.by_option().values()):
            raise InputError(f"--markdown: writes a picture {path} too: choose another file for --svg")
        if (path.exists() or path.is_symlink()) and not (files.force and f"]({name})" in linked):
            raise InputError(
                f"--markdown: its picture {path} exists already and is not of this report: choose another folder"
            )


def _contents(document: Document, plans: Sequence[PlanReport], files: ReportFiles) -> dict[Path, bytes]:
    """Return the content of every file to write."""
    contents = {files.page: render_html(document).encode()}
    if files.png is not None:
        contents[files.png] = png(plans[0].picture)
    if files.svg is not None:
        contents[files.svg] = svg(plans[0].picture).encode()
    if files.markdown is not None:
        for name, text in picture_files(document).items():
            contents[files.markdown.with_name(name)] = text.encode()
        contents[files.markdown] = render_markdown(document).encode()
    if files.data is not None:
        contents[files.data] = (document.model_dump_json(indent=1) + "\n").encode()
    return contents
