"""Arguments and options that several commands share, and what they make."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import typer

from translution.planner.common.errors import InputError
from translution.planner.common.files import read_yaml
from translution.planner.config.loading import load_model_spec
from translution.planner.config.model import ModelSpec, override

Model = Annotated[str, typer.Argument(metavar="MODEL", help="Preset (vit-base/16, gpt-base/1024) or YAML/JSON file.")]
Operator = Annotated[str | None, typer.Option(help="translution, alpha, attention, bias, shaw or absolute.")]
Roles = Annotated[str | None, typer.Option(help="Relative roles, a subset of qkv.")]
C1 = Annotated[int | None, typer.Option(help="First low width per head of alpha.")]
C2 = Annotated[int | None, typer.Option(help="Second low width per head of alpha.")]
Layers = Annotated[str | None, typer.Option(help="Relative layers: all, first:K or every:K; others are attention.")]
Settings = Annotated[
    list[str] | None, typer.Option("--set", metavar="FIELD=VALUE", help="Any other field of the model; repeatable.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")]
PrecisionName = Annotated[str, typer.Option("--precision", help="fp32, or bf16 with an fp32 master copy.")]
Stage = Annotated[int, typer.Option(min=0, max=3, help="ZeRO stage.")]
Tile = Annotated[int | None, typer.Option(help="Relations per tile of a table; chosen unless given.")]
Offload = Annotated[str, typer.Option(help="What leaves the device: none, cpu-optimizer, cpu, nvme-optimizer or nvme.")]
NvmePath = Annotated[str | None, typer.Option(help="Folder on every node's NVMe drive, for nvme.")]
OffloadRatio = Annotated[float, typer.Option(help="Share of the optimizer that leaves, for cpu-optimizer.")]
TrainingSettings = Annotated[
    list[str] | None, typer.Option("--train", metavar="FIELD=VALUE", help="Any other field of training; repeatable.")
]
Knobs = Annotated[
    list[str] | None,
    typer.Option("--zero", metavar="FIELD=VALUE", help="A knob of ZeRO, set otherwise than chosen; repeatable."),
]
MicroBatch = Annotated[int, typer.Option(help="Samples per rank and forward pass.")]


def parse_settings(settings: Sequence[str] | None, flag: str = "--set") -> dict[str, object]:
    """``FIELD=VALUE`` texts as a mapping; values are read as YAML.

    Raises:
        InputError: for a text without a field or value, or a value that is not YAML.
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


def resolve_model(
    model: str,
    operator: str | None,
    roles: str | None,
    c1: int | None,
    c2: int | None,
    relative_layers: str | None,
    settings: Sequence[str] | None,
) -> ModelSpec:
    """The spec of MODEL with the flags' fields replaced.

    Raises:
        InputError: for an unknown model or a bad field.
    """
    flags = {"operator": operator, "roles": roles, "c1": c1, "c2": c2, "relative_layers": relative_layers}
    return override(load_model_spec(model), **(flags | parse_settings(settings)))
