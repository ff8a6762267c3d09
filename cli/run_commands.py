"""Commands that start processes: calibrating, launching, rehearsing; and verifying what they left."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from .application import app
from .options import Json


@app.command(
    epilog="Examples: **translution calibrate --cluster cpu:2 --out laptop.yaml** · **translution plan my.yaml "
    "--cluster laptop.yaml --out plans/small**"
)
def calibrate(
    cluster: Annotated[str, typer.Option(help="cpu:RANKS, or GPUSxNAME of this machine.")],
    out: Annotated[Path, typer.Option(help="Cluster file to write (YAML); plans take it as --cluster.")],
    nvme_path: Annotated[str | None, typer.Option(help="Folder on the drive to measure; else none is.")] = None,
    json: Json = False,
) -> None:
    """Measure this machine's rates, for predictions of time."""
    from .commands.calibrate import run_calibrate

    run_calibrate(cluster, out, nvme_path, as_json=json)


@app.command(hidden=True)
def calibrate_rank(folder: Path, device: str, nvme_path: Annotated[Path | None, typer.Argument()] = None) -> None:
    """Measure as one rank; `calibrate` starts it."""
    from translution.distributed.calibration.run import calibrate_rank as measure

    measure(folder, device, nvme_path)


HostFile = Annotated[
    Path | None, typer.Option(help="Start on these hosts through ssh and pdsh: a line HOST slots=RANKS for each.")
]
SshPort = Annotated[int | None, typer.Option(help="Port of the hosts' ssh, if not its usual one.")]
MasterAddress = Annotated[
    str | None, typer.Option(help="How the hosts reach the first; else its name in the hostfile.")
]
MasterPort = Annotated[int | None, typer.Option(help="Port at which ranks meet; else a free one, or 29500.")]


@app.command(
    epilog="Examples: **translution launch plans/small** · **translution launch plans/small --resume** · "
    "**translution launch plans/large --hostfile hosts**"
)
def launch(
    plan_folder: Annotated[Path, typer.Argument(help="As `translution plan` writes it.")],
    run: Annotated[Path | None, typer.Option(help="Run folder to make; else the next runs/NNN of the plan.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with --run, or the newest run that has a checkpoint.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Start although preflight finds something amiss.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the command and start nothing.")] = False,
    hostfile: HostFile = None,
    no_ssh: Annotated[
        bool, typer.Option("--no-ssh", help="Start only this host's ranks; do the same on every other host.")
    ] = False,
    node_rank: Annotated[int, typer.Option(help="With --no-ssh: this host's line in the hostfile, from 0.")] = 0,
    master_addr: MasterAddress = None,
    master_port: MasterPort = None,
    ssh_port: SshPort = None,
) -> None:
    """Run a plan through DeepSpeed's launcher, on this machine or on the hosts of a hostfile."""
    from translution.distributed.launcher.launch import Where

    from .commands.launch import run_launch

    where = Where(hostfile, no_ssh, node_rank, master_addr, master_port, ssh_port)
    run_launch(plan_folder, run, where, resume=resume, force=force, dry_run=dry_run)


@app.command(
    epilog="Examples: **translution prepare book.txt --out data/book** · **translution prepare a.txt b.txt --tokenizer "
    "tokenizer.json --held-out 0.05 --out data/both**"
)
def prepare(
    texts: Annotated[list[Path], typer.Argument(metavar="TEXT...", help="Text files.")],
    out: Annotated[Path, typer.Option(help="Folder to write; plans take it as --train data_path=FOLDER.")],
    tokenizer: Annotated[
        Path | None, typer.Option(help="A tokenizer.json of Hugging Face's tokenizers; else every byte is a token.")
    ] = None,
    held_out: Annotated[float, typer.Option(help="Share of each text, at its end, to evaluate with.")] = 0.1,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing folder of tokens.")] = False,
    json: Json = False,
) -> None:
    """Make token files to train a gpt model on from text files."""
    from .commands.prepare import run_prepare

    run_prepare(texts, out, tokenizer, held_out, force=force, as_json=json)


@app.command(
    epilog="Examples: **translution preflight plans/small** · **translution preflight plans/large --hostfile hosts**"
)
def preflight(
    plan_folder: Annotated[Path, typer.Argument(help="As `translution plan` writes it.")],
    hostfile: HostFile = None,
    master_addr: MasterAddress = None,
    master_port: MasterPort = None,
    ssh_port: SshPort = None,
    compile_ops: Annotated[
        bool, typer.Option("--compile", help="Compile what the ranks need of DeepSpeed, too.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="End with 0 although something is amiss.")] = False,
    reports: Annotated[
        Path | None, typer.Option(help="Folder of what every node has written with preflight-node --out.")
    ] = None,
    json: Json = False,
) -> None:
    """Look for what would keep a plan from running on this machine or on hosts; exit code 1 if there is anything."""
    from translution.distributed.launcher.launch import Where

    from .commands.preflight import run_preflight

    where = Where(hostfile, master_addr=master_addr, master_port=master_port, ssh_port=ssh_port)
    run_preflight(plan_folder, where, reports, compile_ops=compile_ops, force=force, as_json=json)


@app.command(hidden=True)
def preflight_node(
    plan_folder: Path,
    listen: Annotated[int | None, typer.Option()] = None,
    reach: Annotated[str | None, typer.Option()] = None,
    out: Annotated[Path | None, typer.Option()] = None,
    compile_ops: Annotated[bool, typer.Option("--compile")] = False,
) -> None:
    """Say how this node is, or compile on it; `launch` and a Slurm job run it on every one."""
    from translution.distributed.preflight.node_report import compile_on_node, report_node

    if compile_ops:
        compile_on_node(plan_folder)
    else:
        report_node(plan_folder, listen=listen, reach=reach, out=out)


@app.command(hidden=True)
def rank(word: str) -> None:
    """Run one rank of a plan as the word tells it; `launch` starts it on every host."""
    from translution.distributed.remote.rank_command import decode

    command = decode(word)
    os.environ.update(command.environment)
    from translution.distributed.training.trainer import train as train_rank

    train_rank(command.plan_folder, command.run, command.mode)


@app.command(hidden=True)
def train(plan_folder: Path, run: Path, mode: str = "train") -> None:
    """Run one rank of a plan; DeepSpeed's launcher or torchrun starts it on every rank."""
    from translution.distributed.runs.mode import RunMode
    from translution.distributed.training.trainer import train as train_rank

    train_rank(plan_folder, run, RunMode(mode))


@app.command(epilog="Example: **translution status plans/small/runs/001**")
def status(
    run: Annotated[Path, typer.Argument(metavar="RUN_FOLDER", help="A run folder.")],
    json: Json = False,
) -> None:
    """Print what every rank last said; exit code 0 if all have finished, 1 if any has not."""
    from .commands.status import run_status

    run_status(run, as_json=json)


@app.command(
    epilog="Examples: **translution rehearse plans/large** · **translution rehearse plans/large --rank 511 --layers 3**"
)
def rehearse(
    plan_folder: Annotated[Path, typer.Argument(help="As `translution plan` writes it.")],
    rank: Annotated[int, typer.Option(help="Rank of the planned world to run.")] = 0,
    layers: Annotated[
        int | None, typer.Option(help="Run a model of so many layers, and of one less, and extrapolate; else all.")
    ] = None,
    run: Annotated[Path | None, typer.Option(help="Run folder to make; else the next runs/NNN of the plan.")] = None,
    nvme_path: Annotated[
        str | None, typer.Option(help="Folder of this machine that stands in for the plan's NVMe path.")
    ] = None,
    compute: Annotated[
        bool, typer.Option("--compute", help="Compute the matrix products too: much slower, the same memory.")
    ] = False,
    json: Json = False,
) -> None:
    """Run one rank of a plan alone on this machine, to measure its memory; its values are meaningless."""
    from .commands.rehearse import run_rehearse

    run_rehearse(plan_folder, rank, layers=layers, run=run, nvme_path=nvme_path, compute=compute, as_json=json)


@app.command(hidden=True)
def rehearse_rank(run: Path, compute: Annotated[bool, typer.Option("--compute")] = False) -> None:
    """Run the one rank of a rehearsal; `rehearse` starts it."""
    from translution.distributed.verification.rehearsal_rank import rehearse_rank as run_rank

    run_rank(run, compute=compute)


@app.command(epilog="Examples: **translution verify plans/small** · **translution verify plans/small/runs/001 --json**")
def verify(
    folder: Annotated[
        Path, typer.Argument(metavar="RUN_FOLDER", help="A run folder, or a plan folder: its newest run.")
    ],
    json: Json = False,
) -> None:
    """Set predicted memory beside what a run measured."""
    from .commands.verify import run_verify

    run_verify(folder, as_json=json)


@app.command(
    epilog="Examples: **translution export plans/small/runs/001 --out small.safetensors** · "
    "**translution export plans/small/runs/001 --out small.safetensors --dtype bf16**"
)
def export(
    run_folder: Annotated[Path, typer.Argument(help="Its newest checkpoint is exported.")],
    out: Annotated[Path, typer.Option(help="File to write (safetensors).")],
    dtype: Annotated[str, typer.Option(help="fp32 or bf16.")] = "fp32",
    force: Annotated[bool, typer.Option("--force", help="Replace a file that exists.")] = False,
    json: Json = False,
) -> None:
    """Write a run's network as one file, tables whole, for inference on one process."""
    from .commands.export import run_export

    run_export(run_folder, out, dtype, force=force, as_json=json)


@app.command(
    epilog="Examples: **translution experiment shift** · **translution experiment language --quick --out quick**"
)
def experiment(
    name: Annotated[str, typer.Argument(metavar="NAME", help="shift, ablation, rank, roles or language.")],
    out: Annotated[
        Path | None,
        typer.Option(help="Folder to write: raw figures, a table and a picture; else experiments/NAME."),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A few steps of one seed, to see that it works.")] = False,
    seeds: Annotated[int | None, typer.Option(min=1, help="How many seeds; else 3.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Steps of each model; else the experiment's.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier result in that folder.")] = False,
    json: Json = False,
) -> None:
    """Ask one of the paper's questions at desk size: train small models of every operator, and compare them."""
    from .commands.experiment import run_and_show

    run_and_show(name, out, quick=quick, seeds=seeds, steps=steps, force=force, as_json=json)
