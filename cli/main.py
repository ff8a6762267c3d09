"""Commands, their options, and how errors become one line and an exit code."""

from __future__ import annotations

import copy
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import typer

from translution.planner.common.errors import TranslutionError
from translution.planner.config.loading import load_model_spec
from translution.planner.config.model import ModelSpec

from . import run_commands  # noqa: F401  # registers its commands
from .application import app
from .options import (
    C1,
    C2,
    Json,
    Knobs,
    Layers,
    MicroBatch,
    Model,
    NvmePath,
    Offload,
    OffloadRatio,
    Operator,
    PrecisionName,
    Roles,
    Settings,
    Stage,
    Tile,
    TrainingSettings,
    parse_settings,
    resolve_model,
)


@app.command(
    epilog="Examples: **translution estimate vit-base/16** · **translution estimate gpt-large/1024 --operator alpha "
    "--c1 8 --c2 8** · **translution estimate my.yaml --ranks 64 --precision bf16 --json**"
)
def estimate(
    model: Model,
    operator: Operator = None,
    roles: Roles = None,
    c1: C1 = None,
    c2: C2 = None,
    relative_layers: Layers = None,
    settings: Settings = None,
    ranks: Annotated[int, typer.Option(min=1, max=2**20, help="Ranks that share the training state.")] = 8,
    micro_batch: MicroBatch = 1,
    precision: PrecisionName = "fp32",
    json: Json = False,
) -> None:
    """Say what a model costs: parameters, activations, memory per rank, operations."""
    from .commands.estimate import run_estimate

    spec = resolve_model(model, operator, roles, c1, c2, relative_layers, settings)
    run_estimate(model, spec, ranks=ranks, micro_batch=micro_batch, precision=precision, as_json=json)


@app.command(
    epilog="Examples: **translution plan my.yaml --cluster cpu:2 --out plans/small** · **translution plan vit-base/16 "
    "--cluster 2x8xH100 --precision bf16 --data synthetic --global-batch 1024 --out plans/large**"
)
def plan(
    model: Model,
    cluster: Annotated[
        str,
        typer.Option(help="cpu:RANKS (this machine), [NODESx]GPUSxNAME, [NODESx]NODE, or a YAML/JSON file."),
    ],
    out: Annotated[Path, typer.Option(help="Plan folder to write.")],
    operator: Operator = None,
    roles: Roles = None,
    c1: C1 = None,
    c2: C2 = None,
    relative_layers: Layers = None,
    settings: Settings = None,
    global_batch: Annotated[
        int | None, typer.Option(help="Samples per optimizer step over all ranks; else 8 per rank.")
    ] = None,
    micro_batch: Annotated[int | None, typer.Option(help="Samples per rank and forward pass; else chosen.")] = None,
    gradient_accumulation_steps: Annotated[
        int | None,
        typer.Option(
            "--accumulation", "--gradient-accumulation-steps", help="Micro-batches per optimizer step; else chosen."
        ),
    ] = None,
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 100,
    samples: Annotated[int | None, typer.Option(help="Samples of an epoch; with --epochs sets the steps.")] = None,
    epochs: Annotated[float, typer.Option(help="Passes over --samples.")] = 1.0,
    warmup_steps: Annotated[int, typer.Option(help="Steps of linear warm-up before the cosine.")] = 0,
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate of AdamW.")] = 1e-3,
    weight_decay: Annotated[float, typer.Option(help="Weight decay of AdamW.")] = 0.05,
    gradient_clipping: Annotated[float, typer.Option(help="Largest gradient norm; 0 clips nothing.")] = 1.0,
    precision: PrecisionName = "fp32",
    data: Annotated[
        str,
        typer.Option(
            help="digits, digits-static, digits-shifted, digits-patches, images, tokens, stdlib or synthetic."
        ),
    ] = "digits",
    seed: Annotated[int, typer.Option(help="Of weights and sample order.")] = 0,
    stage: Annotated[int | None, typer.Option(min=0, max=3, help="ZeRO stage; else chosen.")] = None,
    tile_relations: Tile = None,
    offload: Annotated[
        str | None,
        typer.Option(help="What leaves the device: none, cpu-optimizer, cpu, nvme-optimizer or nvme; else chosen."),
    ] = None,
    nvme_path: NvmePath = None,
    offload_ratio: Annotated[
        float | None, typer.Option(help="Share of the optimizer that leaves, for cpu-optimizer; else chosen.")
    ] = None,
    checkpointing: Annotated[
        str | None, typer.Option(help="none, block or offload; else the model's unless none, or chosen.")
    ] = None,
    minimize: Annotated[str, typer.Option(help="time, nodes, cost or memory.")] = "time",
    headroom: Annotated[float, typer.Option(help="Share of every memory that is to stay free.")] = 0.08,
    all_nodes: Annotated[bool, typer.Option("--all-nodes", help="Use every node of the cluster.")] = False,
    training_settings: TrainingSettings = None,
    knobs: Knobs = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing plan folder; its runs stay.")] = False,
    json: Json = False,
) -> None:
    """Search the best plan for a cluster, say why, and write its folder."""
    from .commands.plan import PlanRequest, run_plan

    spec = resolve_model(model, operator, roles, c1, c2, relative_layers, settings)
    training = {
        "steps": steps,
        "warmup_steps": warmup_steps,
        "learning_rate": learning_rate,
        "weight_decay": weight_decay,
        "gradient_clipping": gradient_clipping,
        "precision": precision,
        "data": data,
        "seed": seed,
    } | parse_settings(training_settings, "--train")
    constraints = {
        "global_batch": global_batch,
        "micro_batch": training.pop("micro_batch", micro_batch),
        "accumulation": training.pop("accumulation", gradient_accumulation_steps),
        "stage": stage,
        "offload": offload,
        "offload_ratio": offload_ratio,
        "nvme_path": nvme_path,
        "checkpointing": _checkpointing(checkpointing, spec),
        "tile_relations": tile_relations,
        "all_nodes": all_nodes,
        "headroom": headroom,
        "minimize": minimize,
        "zero_overrides": parse_settings(knobs, "--zero"),
    }
    request = PlanRequest(spec, cluster, training, constraints, samples, epochs)
    run_plan(request, out, force=force, as_json=json)


def _checkpointing(asked: str | None, spec: ModelSpec) -> str | None:
    """What the user asked for, or the model's own mode; none at all leaves it to the search."""
    if asked is not None:
        return asked
    return None if spec.checkpointing == "none" else spec.checkpointing


def _stage(value: int) -> Literal[0, 1, 2, 3]:
    return value  # type: ignore[return-value]  # typer keeps it within 0 and 3


@app.command(
    epilog="Examples: **translution measure plans/small** · **translution measure vit-tiny/56 --cluster cpu:2 "
    "--stage 2** · **translution measure my.yaml --cluster cpu:2 --offload nvme --nvme-path /nvme/swap**"
)
def measure(
    target: Annotated[str, typer.Argument(metavar="PLAN_OR_MODEL", help="A plan folder; or a preset or spec file.")],
    cluster: Annotated[str, typer.Option(help="cpu:RANKS, or GPUSxNAME of this machine; for a model.")] = "cpu:1",
    settings: Settings = None,
    precision: PrecisionName = "fp32",
    micro_batch: MicroBatch = 1,
    stage: Stage = 3,
    tile_relations: Tile = None,
    offload: Offload = "none",
    nvme_path: NvmePath = None,
    offload_ratio: OffloadRatio = 1.0,
    training_settings: TrainingSettings = None,
    knobs: Knobs = None,
    resume: Annotated[bool, typer.Option(help="Also measure resuming from the checkpoint.")] = True,
    out: Annotated[Path | None, typer.Option(help="Folder to keep plan and run in; else they are removed.")] = None,
    json: Json = False,
) -> None:
    """Run a model or plan for a few steps; set predicted memory beside measured, phase by phase."""
    from .commands.measure import plan_of, run_measure
    from .commands.plan import plan_from

    plan = plan_of(Path(target))
    if plan is None:
        training = {"precision": precision, "micro_batch": micro_batch, "data": "synthetic"}
        plan = plan_from(
            resolve_model(target, None, None, None, None, None, settings),
            cluster,
            training | parse_settings(training_settings, "--train"),
            stage=_stage(stage),
            tile_relations=tile_relations,
            offload=offload,
            nvme_path=nvme_path,
            offload_ratio=offload_ratio,
            zero_overrides=parse_settings(knobs, "--zero"),
        )
    run_measure(plan, out, resume=resume, as_json=json)


@app.command(
    epilog="Examples: **translution compare vit-base/16** · **translution compare vit-base/16 gpt-base/1024 --gpu H200 "
    "--out table.md** · **translution compare vit-base/16 --out scaling.png**"
)
def compare(
    models: Annotated[list[str], typer.Argument(metavar="MODEL...", help="Presets, or YAML/JSON files.")],
    gpu: Annotated[str, typer.Option(help="Of which the clusters are; `translution clusters` lists them.")] = "H100",
    precision: Annotated[str, typer.Option(help="fp32, bf16 or fp16.")] = "bf16",
    alpha_rank: Annotated[
        list[int] | None, typer.Option(help="c1 = c2 of an α-Translution; repeatable; 4 to 64 unless given.")
    ] = None,
    out: Annotated[
        list[Path] | None, typer.Option(help="File to write: .md, .csv, .json, .png or .svg; repeatable.")
    ] = None,
    json: Json = False,
) -> None:
    """Compare full Translution with α-Translution and attention: cost, memory, smallest cluster, time."""
    from translution.planner.analysis.compare import ALPHA_RANKS

    from .commands.compare import run_compare

    specs = [load_model_spec(model) for model in models]
    run_compare(specs, gpu, precision, alpha_rank or ALPHA_RANKS, out or (), as_json=json)


@app.command(epilog="Examples: **translution clusters** · **translution clusters --json**")
def clusters(json: Json = False) -> None:
    """List the GPUs and nodes that `--cluster` knows, each figure with its source."""
    from .commands.clusters import run_clusters

    run_clusters(as_json=json)


@app.command(
    epilog="Examples: **translution report plans/small --out small.html** · **translution report plans/small/runs/001 "
    "--out run.html --png timeline.png** · **translution report --model vit-base/16 --scaling vit-small/16 --cluster "
    "8xH100 --out costs.html --markdown costs.md**"
)
def report(
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
    scaling: Annotated[str | None, typer.Option(help="Preset or file around which sizes and nodes grow.")] = None,
    cluster: Annotated[
        str, typer.Option(help="For the three options above, as `translution plan` takes it.")
    ] = "8xH100",
    experiments: Annotated[Path | None, typer.Option(help="Folder of what `translution experiment` wrote.")] = None,
    accuracy: Annotated[Path | None, typer.Option(help="accuracy.json of benchmarks/accuracy.py.")] = None,
    step_time: Annotated[Path | None, typer.Option(help="step_time.json of benchmarks/step_time.py.")] = None,
    benchmarks: Annotated[Path | None, typer.Option(help="Folder with operator.json and planner.json.")] = None,
    png: Annotated[Path | None, typer.Option(help="Write a plan's memory timeline as PNG too.")] = None,
    svg: Annotated[Path | None, typer.Option(help="Write a plan's memory timeline as SVG too.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Write Markdown too, its pictures as SVG beside it.")] = None,
    data: Annotated[Path | None, typer.Option(help="Write all that the report shows as JSON too.")] = None,
    json: Json = False,
) -> None:
    """Write a page on plans, runs, models, experiments and benchmarks, each where it is given."""
    from .commands.report import ReportInputs, ReportOutputs, run_report

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
    run_report(inputs, ReportOutputs(out, png, svg, markdown, data), as_json=json)


@app.command(
    epilog="Examples: **translution serve** · **translution serve --port 8080 --open** · "
    "**translution serve --host 0.0.0.0 --workers 4**"
)
def serve(
    host: Annotated[str, typer.Option(help="Interface to listen on; by default this machine alone.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes a free one.")] = 8000,
    workers: Annotated[
        int | None, typer.Option(min=1, max=64, help="Processes that search; else one for each core.")
    ] = None,
    warm: Annotated[bool, typer.Option(help="Search what may be asked for next while nobody asks.")] = True,
    open_page: Annotated[bool, typer.Option("--open", help="Show the page in a browser.")] = False,
) -> None:
    """Serve a page on which to choose model, operator, cluster and batch, and see costs and the best plan."""
    from .commands.serve import run_serve

    run_serve(host, port, workers, warm=warm, open_page=open_page)


def _show_version(wanted: bool) -> None:
    if wanted:
        from translution.planner.plans.plan import version

        typer.echo(f"translution-scale {version()}")
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Plan and train full Translution models."""


def run(arguments: Sequence[str]) -> int:
    """Run the command line; errors are one line on stderr.

    Returns:
        The exit code.
    """
    try:
        code = _with_one_command(arguments)(args=list(arguments), standalone_mode=False)
    except TranslutionError as error:
        return _fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except BrokenPipeError:
        # The reader of our output, such as head, has gone.
        sys.stderr.close()
        return 1
    except Exception as error:
        # Typer's usage errors; their classes moved between versions, their interface did not.
        if not hasattr(error, "format_message"):
            if type(error).__name__ == "Abort":
                return _fail("interrupted", 130)
            raise
        return _fail(error.format_message() or "no command given: see translution --help", 2)
    return code if isinstance(code, int) else 0


def _with_one_command(arguments: Sequence[str]) -> typer.Typer:
    """The application without the commands that are not asked for: Typer would build all, in a tenth of a second."""
    named = (
        [info for info in app.registered_commands if info.callback and info.callback.__name__ == arguments[0]]
        if (arguments)
        else []
    )
    if not named:
        return app
    alone = copy.copy(app)
    alone.registered_commands = named
    return alone


def _fail(message: str, code: int) -> int:
    print(f"translution: error: {' '.join(message.split())}", file=sys.stderr)
    return code
