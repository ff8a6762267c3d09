"""``translution calibrate``."""

from __future__ import annotations

import shlex
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from translution.distributed.calibration import calibrate_to_file
from translution.planner.hardware import MeasuredRates, Transfer

from ...completion import complete_cluster
from ...options import JsonOption
from ...output import console, make_table, print_json
from ...progress import WorkProgress
from .. import app


def _rows(rates: MeasuredRates) -> list[tuple[str, str]]:
    rows = []
    for precision in dict.fromkeys(point.precision for point in rates.matmul):
        points = [point for point in rates.matmul if point.precision == precision]
        low, high = (choose(points, key=lambda point: point.flops_per_s) for choose in (min, max))
        text = (
            f"{low.flops_per_s / 1e9:.3g} ({low.rows} x {low.width}) to "
            f"{high.flops_per_s / 1e9:.3g} GFLOP/s ({high.rows} x {high.width})"
        )
        rows.append((f"matrix products, {precision}", text))
    for name, value in rates:
        words = name.replace("_bytes_per_s", "").replace("_elements_per_s", "").removesuffix("_s").replace("_", " ")
        if isinstance(value, Transfer):
            rows.append((words, f"{value.latency_s * 1e6:.3g} us and {value.bytes_per_s / 1e9:.3g} GB/s"))
        elif isinstance(value, float) and name.endswith("elements_per_s"):
            rows.append((words, f"{value / 1e6:.3g} M elements/s"))
        elif isinstance(value, float) and name.endswith("bytes_per_s"):
            rows.append((words, f"{value / 1e9:.3g} GB/s"))
        elif isinstance(value, float):
            rows.append((words, f"{value * 1e6:.3g} us"))
    return rows


@app.command(
    "calibrate",
    epilog="Examples: **translution calibrate --cluster cpu:2 --out laptop.yaml** · **translution plan my.yaml "
    "--cluster laptop.yaml --out plans/small**",
)
def calibrate_cli(
    cluster_name: Annotated[
        str, typer.Option("--cluster", help="cpu:RANKS, or GPUSxNAME of this machine.", autocompletion=complete_cluster)
    ],
    out: Annotated[Path, typer.Option(help="Cluster file to write (YAML); plans take it as --cluster.")],
    nvme_path: Annotated[
        str | None, typer.Option(help="Folder on the NVMe drive to measure; without it no drive is measured.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the file if it exists.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Measure the compute and transfer rates of this machine, for predictions of time."""
    began = time.monotonic()
    with WorkProgress("calibrating") as progress:

        def show(line: str, number: int, total: int) -> None:
            progress.show(number, total, line)

        command = shlex.join(["translution", *sys.argv[1:]])
        rates = calibrate_to_file(cluster_name, out, nvme_path, command, show, force=force)
    if as_json:
        print_json({"file": str(out), "measured": rates.model_dump(mode="json")})
        return
    seconds = time.monotonic() - began
    title = f"{rates.machine}: {rates.ranks} rank(s) in parallel, {seconds:.0f} s"
    console().print(make_table(title, ("operation", "rate"), _rows(rates), text_columns=2))
    console().print(
        f"wrote {out}; plan with it: translution plan MODEL --cluster {shlex.quote(str(out))} --out FOLDER",
        soft_wrap=True,
    )
