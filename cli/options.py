"""Arguments and options that several commands share, and how their values are read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from translution.planner import ModelSpec, TrainingSpec, load_model
from translution.planner.common.errors import InputError, nearest
from translution.planner.common.files import read_yaml

ModelArgument = Annotated[
    str, typer.Argument(metavar="MODEL", help="Preset (vit-base/16, gpt-base/1024) or YAML/JSON file.")
]
OperatorOption = Annotated[str | None, typer.Option(help="translution, alpha, attention, bias, shaw or absolute.")]
RolesOption = Annotated[str | None, typer.Option(help="Relative roles, a subset of qkv.")]
C1Option = Annotated[int | None, typer.Option(help="First low rank per head of alpha.")]
C2Option = Annotated[int | None, typer.Option(help="Second low rank per head of alpha.")]
RelativeLayersOption = Annotated[
    str | None, typer.Option(help="Relative layers: all, first:K or every:K; the others use attention.")
]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="FIELD=VALUE", help="Any other field of the model; repeatable.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")]
PrecisionOption = Annotated[str, typer.Option("--precision", help="fp32, or bf16 with an fp32 master copy.")]
StageOption = Annotated[int, typer.Option(min=0, max=3, help="ZeRO stage.")]
TileOption = Annotated[int | None, typer.Option(help="Relations per tile of a table; chosen by default.")]
OffloadOption = Annotated[
    str, typer.Option(help="What is offloaded: none, cpu-optimizer, cpu, nvme-optimizer or nvme.")
]
NvmePathOption = Annotated[str | None, typer.Option(help="Folder on every node's NVMe drive, for offload to NVMe.")]
OffloadRatioOption = Annotated[
    float, typer.Option(help="Fraction of the optimizer state to offload, for cpu-optimizer.")
]
TrainOption = Annotated[
    list[str] | None, typer.Option("--train", metavar="FIELD=VALUE", help="Any other field of training; repeatable.")
]
ZeroOption = Annotated[
    list[str] | None,
    typer.Option("--zero", metavar="FIELD=VALUE", help="A ZeRO setting to use instead of the chosen one; repeatable."),
]
MicroBatchOption = Annotated[int, typer.Option(help="Samples per rank and forward pass.")]

PlanFolderArgument = Annotated[
    Path, typer.Argument(metavar="PLAN_FOLDER", help="Folder that `translution plan` wrote.")
]
RunFolderOption = Annotated[
    Path | None, typer.Option(help="Run folder to create; the plan's next runs/NNN by default.")
]
HostfileOption = Annotated[
    Path | None, typer.Option(help="Start on these hosts through ssh and pdsh; one line HOST slots=RANKS per host.")
]
SshPortOption = Annotated[int | None, typer.Option(help="ssh port of the hosts; by default ssh's own.")]
MasterAddressOption = Annotated[
    str | None, typer.Option(help="Address of the first host; by default its name in the hostfile.")
]
MasterPortOption = Annotated[
    int | None, typer.Option(help="Port where the ranks meet; by default a free one, or 29500 with --no-ssh.")
]


def parse_settings(settings: Sequence[str] | None, flag: str = "--set") -> dict[str, object]:
    """Return ``FIELD=VALUE`` texts as a mapping; values are read as YAML.

    Raises:
        InputError: if a text has no field or no value, or a value is not YAML.
    """
    values: dict[str, object] = {}
    for text in settings or ():
        field, equals, value = text.partition("=")
        if not equals or not field:
            raise InputError(f"{flag}: {text!r} is not allowed: must be FIELD=VALUE")
        values[field.strip()] = read_yaml(value, f"{flag} {field.strip()}")
        if values[field.strip()] is None:
            raise InputError(f"{flag}: {text!r} is not allowed: a value must follow the =")
    return values


def parse_training_settings(settings: Sequence[str] | None) -> dict[str, object]:
    """Return the texts of ``--train`` as fields of `TrainingSpec`.

    Raises:
        InputError: as `parse_settings` does, and if a field is unknown.
    """
    values, known = parse_settings(settings, "--train"), (*TrainingSpec.model_fields, "accumulation")
    for name in values:
        if name not in known:
            raise InputError(f"--train: unknown key {name!r}{nearest(name, known)}; allowed: {', '.join(known)}")
    return values


def resolve_model(
    model: str,
    operator: str | None,
    roles: str | None,
    c1: int | None,
    c2: int | None,
    relative_layers: str | None,
    settings: Sequence[str] | None,
) -> ModelSpec:
    """Return the model named by the argument, with the fields of the flags replaced.

    Raises:
        InputError: if the model is unknown or a field is invalid.
    """
    flags = {"operator": operator, "roles": roles, "c1": c1, "c2": c2, "relative_layers": relative_layers}
    return load_model(model, **(flags | parse_settings(settings)))
