"""``translution launch``."""

from __future__ import annotations

import shlex
import time
from collections import deque
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from translution.distributed.launcher import LaunchResult, launch
from translution.distributed.remote import LaunchTarget
from translution.planner.common import InputError, format_bytes
from translution.planner.plans import Plan, load_plan

from ...options import (
    HOSTS_PANEL,
    HostfileOption,
    JsonOption,
    MasterAddressOption,
    MasterPortOption,
    PlanFolderArgument,
    RunFolderOption,
    SshPortOption,
)
from ...output import console, note, print_json
from .. import app

_STEPS_PER_LINE = 20
"""Steps between two printed lines if the output is not a terminal."""
_EVALUATION_SECONDS_PER_LINE = 20.0
"""Seconds between two printed lines of an evaluation if the output is not a terminal."""
_RECENT_STEPS = 20
"""Number of recent steps whose median is the time of a step."""


def format_scores(metrics: Mapping[str, Any]) -> str:
    """Return the result of an evaluation as text."""
    top5, perplexity = metrics.get("top5_accuracy"), metrics.get("perplexity")
    of_five = "" if top5 is None else f" (top-5 {top5:.2%})"
    exponential = "" if perplexity is None else f", perplexity {perplexity:,.2f}"
    return f"accuracy {metrics['accuracy']:.2%}{of_five}, loss {metrics['loss']:.4f}{exponential}"


class LaunchProgress:
    """Shows progress and predictions: a progress bar on a terminal, otherwise a line every few steps."""

    def __init__(self, console: Console, plan: Plan) -> None:
        self._console, self._plan, self._steps = console, plan, plan.training.steps
        self._first = 0
        self._seconds: deque[float] = deque(maxlen=_RECENT_STEPS)
        self._memory = ""
        self._printed = 0.0
        self._progress = Progress(
            TextColumn("step"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[text]}", markup=False),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task("train", total=self._steps, text="")

    def __enter__(self) -> LaunchProgress:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def show(self, metrics: Mapping[str, Any]) -> None:
        """Show one line of the metrics file."""
        if metrics["event"] == "resume":
            self._first = metrics["step"]
            self._progress.reset(self._task, completed=self._first)
        elif metrics["event"] == "step":
            self._show_step(metrics)
        elif metrics["event"] == "memory":
            measured, predicted = metrics["peak_bytes"], self._plan.prediction.peak_bytes
            self._memory = f", memory {format_bytes(measured)} (predicted {format_bytes(predicted)})"
            if not self._console.is_terminal:
                self._console.print(f"step {metrics['step']}/{self._steps}{self._memory} of rank 0", soft_wrap=True)
        elif metrics["event"] == "evaluating":
            self._show_evaluating(metrics)
        elif metrics["event"] == "evaluation":
            self._console.print(
                f"step {metrics['step']}/{self._steps}, held-out: {format_scores(metrics)} "
                f"({metrics['samples']} samples)",
                soft_wrap=True,
            )

    def _show_evaluating(self, metrics: Mapping[str, Any]) -> None:
        text = f"evaluating, {metrics['done']} of {metrics['samples']} samples"
        self._progress.update(self._task, completed=metrics["step"], text=text + self._memory)
        if metrics["done"] == 0:
            self._printed = time.monotonic()
        elif not self._console.is_terminal and time.monotonic() - self._printed >= _EVALUATION_SECONDS_PER_LINE:
            self._printed = time.monotonic()
            self._console.print(f"step {metrics['step']}/{self._steps}: {text}", soft_wrap=True)

    def _show_step(self, metrics: Mapping[str, Any]) -> None:
        step, plan = metrics["step"], self._plan
        self._seconds.append(metrics["seconds"])
        # The median, because the first step and the two steps whose memory is measured are slower than the others.
        seconds = median(self._seconds)
        samples = plan.training.global_batch(plan.cluster.world_size) / seconds
        predicted = "" if plan.time is None else f" (predicted {plan.time.likely_s:.3g} s)"
        rate = f"{samples:,.0f}" if samples >= 10 else f"{samples:.2g}"
        text = f"loss {metrics['loss']:.4f}, {rate} samples/s, {seconds:.3g} s per step{predicted}"
        self._progress.update(self._task, completed=step, text=text + self._memory)
        if not self._console.is_terminal and (step % _STEPS_PER_LINE == 0 or step in (self._first + 1, self._steps)):
            self._console.print(f"step {step}/{self._steps}: {text}", soft_wrap=True)


@app.command(
    "launch",
    epilog="Examples: **translution launch plans/small** · **translution launch plans/small --resume** · "
    "**translution launch plans/large --hostfile hosts**",
)
def launch_cli(
    plan_folder: PlanFolderArgument,
    run: RunFolderOption = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Resume --run, or the newest run that has a checkpoint.")
    ] = False,
    weights: Annotated[
        Path | None,
        typer.Option("--from", help="Network file from which a new run starts, as export and import write."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Start even if preflight finds a problem.")] = False,
    no_verify: Annotated[
        bool, typer.Option("--no-verify", help="Resume without comparing the checkpoint's checksums.")
    ] = False,
    hang_minutes: Annotated[
        float | None,
        typer.Option(
            envvar="TRANSLUTION_HANG_MINUTES",
            help="Minutes after which a rank that stands still ends the run; 0 never. [default: by the predicted time]",
            show_default=False,
        ),
    ] = None,
    check_swap: Annotated[
        bool,
        typer.Option(
            "--check-swap",
            help="End the run if a value changes on an NVMe drive; adds about a tenth to steps that mostly swap.",
        ),
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the command and start nothing.")] = False,
    hostfile: HostfileOption = None,
    no_ssh: Annotated[
        bool,
        typer.Option(
            "--no-ssh",
            help="Start only this host's ranks; run the same command on every other host.",
            rich_help_panel=HOSTS_PANEL,
        ),
    ] = False,
    node_rank: Annotated[
        int | None,
        typer.Option(
            help="With --no-ssh: this host's line in the hostfile, from 0.",
            show_default="0",
            rich_help_panel=HOSTS_PANEL,
        ),
    ] = None,
    master_addr: MasterAddressOption = None,
    master_port: MasterPortOption = None,
    ssh_port: SshPortOption = None,
    as_json: JsonOption = False,
) -> None:
    """Run a plan through DeepSpeed's launcher, on this machine or on the hosts of a hostfile."""
    if no_verify and not resume:
        raise InputError("no-verify: is not allowed: must be used with --resume")
    target = LaunchTarget(hostfile, no_ssh, node_rank, master_addr, master_port, ssh_port)
    if dry_run:
        planned = launch(
            plan_folder,
            run=run,
            target=target,
            resume=resume,
            weights=weights,
            hang_minutes=hang_minutes,
            check_swap=check_swap,
            dry_run=True,
        )
        if planned.rank_command is not None:
            note("the last argument is the encoded command of every rank: " + planned.rank_command.model_dump_json())
        if as_json:
            print_json(_document(planned) | {"shell": planned.shell_line()})
        else:
            print(planned.shell_line())
        return
    # One JSON document is all that programs want on stdout.
    to = console(stderr=as_json)
    last: dict[str, Mapping[str, Any]] = {}

    def show(metrics: Mapping[str, Any]) -> None:
        last[metrics["event"]] = metrics
        display.show(metrics)

    with LaunchProgress(to, load_plan(plan_folder)) as display:
        launched = launch(
            plan_folder,
            run=run,
            target=target,
            resume=resume,
            weights=weights,
            force=force,
            verify=not no_verify,
            hang_minutes=hang_minutes,
            check_swap=check_swap,
            on_metrics=show,
            on_message=partial(to.print, soft_wrap=True),
            on_warning=note,
        )
    if as_json:
        print_json(_document(launched) | {name: last.get(name) for name in ("step", "evaluation")})
        return
    to.print(f"finished: {launched.run}", soft_wrap=True)
    to.print(f"predicted against measured memory: translution verify {shlex.quote(str(launched.run))}", soft_wrap=True)


def _document(launched: LaunchResult) -> dict[str, object]:
    return {"run": str(launched.run), "command": launched.command, "environment": launched.environment}
