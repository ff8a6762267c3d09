"""``translution report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from translution.planner.common import format_bytes

from ...extras import requires_extra
from ...options import JsonOption
from ...output import print_json
from ...progress import WorkProgress
from .. import app


@app.command(
    "report",
    epilog="Examples: **translution report plans/small --out small.html** · **translution report plans/small/runs/001 "
    "--out run.html --png timeline.png** · **translution report --model vit-base/16 --scaling vit-small/16 --cluster "
    "8xH100 --out costs.html --markdown costs.md**",
)
def report_cli(
    out: Annotated[Path, typer.Option(help="HTML page to write; it needs no network.")],
    folders: Annotated[
        list[Path] | None,
        typer.Argument(metavar="[PLAN_OR_RUN]...", help="Plan folders or run folders; several runs share charts."),
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
    gpu: Annotated[Path | None, typer.Option(help="Folder of scripts/gpu_check.py's results, if any yet.")] = None,
    public: Annotated[Path | None, typer.Option(help="public.json of benchmarks/public_runs.py.")] = None,
    snapshot: Annotated[
        Path | None, typer.Option(help="Memory snapshot of torch, pickle or JSON, to lay over the plan's prediction.")
    ] = None,
    snapshot_steps: Annotated[int, typer.Option(help="Number of optimizer steps in the snapshot.")] = 1,
    png: Annotated[Path | None, typer.Option(help="Also write a plan's memory timeline as PNG.")] = None,
    svg: Annotated[Path | None, typer.Option(help="Also write a plan's memory timeline as SVG.")] = None,
    markdown: Annotated[
        Path | None, typer.Option(help="Also write Markdown, with its pictures as SVG files next to it.")
    ] = None,
    data: Annotated[Path | None, typer.Option(help="Also write all content of the report as JSON.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace existing files.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Write a page about plans, runs, models, experiments and benchmarks."""
    with requires_extra("report"):
        from translution.reports import ReportFiles, ReportRequest, write_report
    request = ReportRequest.load(
        plans=folders or (),
        models=model or (),
        compared=compare or (),
        scaled=scaling,
        cluster=cluster,
        experiments=experiments,
        accuracy=accuracy,
        step_time=step_time,
        benchmarks=benchmarks,
        gpu=gpu,
        public=public,
        snapshot=snapshot,
        snapshot_steps=snapshot_steps,
    )
    with WorkProgress("writing the report"):
        sizes = write_report(request, ReportFiles(out, png, svg, markdown, data, force))
    if as_json:
        print_json({"files": {str(path): size for path, size in sizes.items()}})
        return
    for path, size in sizes.items():
        print(f"wrote {path} ({format_bytes(size)})")
