"""Arguments and options that several commands share, and how their values are read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from translution.planner import TrainingSpec
from translution.planner.common import InputError, nearest, read_yaml

from .completion import choices, complete_model


def join_settings(
    flags: Mapping[str, object], settings: Sequence[tuple[str, object]] | None, option: str
) -> dict[str, Any]:
    """Return the fields that flags of their own and a repeatable ``FIELD=VALUE`` option set.

    Args:
        flags: values by field; None is a flag that is not given.
        settings: what `parse_setting` made of each use of the option.
        option: the option, such as "--set".

    Raises:
        InputError: if a field is given twice, by the option and its flag or twice by the option.
    """
    given = {field: value for field, value in flags.items() if value is not None}
    for field, value in settings or ():
        if field in given:
            flag = f"--{field.replace('_', '-')}"
            other = flag if flags.get(field) is not None else f"{option} {field}"
            raise InputError(f"{option} {field}: {value!r} is not allowed: {other} gives it too, as {given[field]!r}")
        given[field] = value
    return given


def parse_setting(text: str, flag: str = "--set") -> tuple[str, object]:
    """Split ``FIELD=VALUE`` into the field and its value, which is read as YAML.

    Raises:
        InputError: if the text has no field or no value, or the value is not YAML.
    """
    field, equals, value = text.partition("=")
    if not equals or not field:
        raise InputError(f"{flag}: {text!r} is not allowed: must be FIELD=VALUE")
    parsed = read_yaml(value, f"{flag} {field.strip()}")
    if parsed is None:
        raise InputError(f"{flag}: {text!r} is not allowed: a value must follow the =")
    return field.strip(), parsed


def parse_training_setting(text: str) -> tuple[str, object]:
    """Split the text of ``--train`` as `parse_setting` does.

    Raises:
        InputError: as `parse_setting` does, and if `TrainingSpec` has no such field.
    """
    field, value = parse_setting(text, "--train")
    known = (*TrainingSpec.model_fields, "accumulation")
    if field not in known:
        raise InputError(f"--train: unknown key {field!r}{nearest(field, known)}; allowed: {', '.join(known)}")
    return "gradient_accumulation_steps" if field == "accumulation" else field, value


def parse_zero_setting(text: str) -> tuple[str, object]:
    """Split the text of ``--zero`` as `parse_setting` does."""
    return parse_setting(text, "--zero")


MODEL_PANEL, TRAINING_PANEL, BATCH_PANEL = "Model", "Training", "Batch"
STRATEGY_PANEL, SEARCH_PANEL, OUTPUT_PANEL = "ZeRO, tiles and offload", "What is searched for", "Output"
HOSTS_PANEL = "Hosts"
"""Panels of options in ``--help``."""
OPERATOR_HELP = (
    "translution (full Translution), alpha (α-Translution), attention, bias (attention, scalars), "
    "shaw (attention, vectors) or absolute (absolute matrices)."
)

ModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="Preset (vit-base/16, gpt-base/1024) or YAML/JSON file.", autocompletion=complete_model
    ),
]
OperatorOption = Annotated[
    str | None,
    typer.Option(
        help=OPERATOR_HELP,
        rich_help_panel=MODEL_PANEL,
        autocompletion=choices("translution", "alpha", "attention", "bias", "shaw", "absolute"),
    ),
]
RolesOption = Annotated[str | None, typer.Option(help="Relative roles, a subset of qkv.", rich_help_panel=MODEL_PANEL)]
C1Option = Annotated[int | None, typer.Option(help="First low rank per head of alpha.", rich_help_panel=MODEL_PANEL)]
C2Option = Annotated[int | None, typer.Option(help="Second low rank per head of alpha.", rich_help_panel=MODEL_PANEL)]
RelativeLayersOption = Annotated[
    str | None,
    typer.Option(
        help="Relative layers: all, first:K or every:K; the others use attention.", rich_help_panel=MODEL_PANEL
    ),
]
SetOption = Annotated[
    list[Any] | None,
    typer.Option(
        "--set",
        metavar="FIELD=VALUE",
        parser=parse_setting,
        help="Any other field of the model; repeatable.",
        rich_help_panel=MODEL_PANEL,
    ),
]
JsonOption = Annotated[
    bool,
    typer.Option(
        "--json", help="Print one JSON document and nothing else; errors as JSON too.", rich_help_panel=OUTPUT_PANEL
    ),
]
PrecisionOption = Annotated[
    str | None,
    typer.Option(
        "--precision",
        help="fp32, or bf16 or fp16 with an fp32 master copy.",
        rich_help_panel=TRAINING_PANEL,
        show_default="bf16 on GPUs, or fp16 where they lack bf16; fp32 on CPUs",
        autocompletion=choices("fp32", "bf16", "fp16"),
    ),
]
StageOption = Annotated[int, typer.Option(min=0, max=3, help="ZeRO stage.", rich_help_panel=STRATEGY_PANEL)]
TileOption = Annotated[
    int | None, typer.Option(help="Relations per tile of a table; chosen by default.", rich_help_panel=STRATEGY_PANEL)
]
complete_offload = choices("none", "cpu-optimizer", "cpu", "nvme-optimizer", "nvme")
OffloadOption = Annotated[
    str,
    typer.Option(
        help="What is offloaded: none, cpu-optimizer, cpu, nvme-optimizer or nvme.",
        rich_help_panel=STRATEGY_PANEL,
        autocompletion=complete_offload,
    ),
]
NvmePathOption = Annotated[
    str | None,
    typer.Option(help="Folder on every node's NVMe drive, for offload to NVMe.", rich_help_panel=STRATEGY_PANEL),
]
OffloadRatioOption = Annotated[
    float | None,
    typer.Option(
        help="Fraction of the optimizer state to offload, for cpu-optimizer.",
        show_default="1",
        rich_help_panel=STRATEGY_PANEL,
    ),
]
TrainOption = Annotated[
    list[Any] | None,
    typer.Option(
        "--train",
        metavar="FIELD=VALUE",
        parser=parse_training_setting,
        help="Any other field of training; repeatable.",
        rich_help_panel=TRAINING_PANEL,
    ),
]
ZeroOption = Annotated[
    list[Any] | None,
    typer.Option(
        "--zero",
        metavar="FIELD=VALUE",
        parser=parse_zero_setting,
        help="A ZeRO setting to use instead of the chosen one; repeatable.",
        rich_help_panel=STRATEGY_PANEL,
    ),
]
MicroBatchOption = Annotated[int, typer.Option(help="Samples per rank and forward pass.", rich_help_panel=BATCH_PANEL)]

PlanFolderArgument = Annotated[
    Path, typer.Argument(metavar="PLAN_FOLDER", help="Folder that `translution plan` wrote.")
]
RunFolderOption = Annotated[
    Path | None, typer.Option(help="Run folder to create; the plan's next runs/NNN by default.")
]
HostfileOption = Annotated[
    Path | None,
    typer.Option(
        help="Start on these hosts through ssh and pdsh; one line HOST slots=RANKS per host.",
        rich_help_panel=HOSTS_PANEL,
    ),
]
SshPortOption = Annotated[
    int | None, typer.Option(help="ssh port of the hosts; by default ssh's own.", rich_help_panel=HOSTS_PANEL)
]
MasterAddressOption = Annotated[
    str | None,
    typer.Option(help="Address of the first host; by default its name in the hostfile.", rich_help_panel=HOSTS_PANEL),
]
MasterPortOption = Annotated[
    int | None,
    typer.Option(
        help="Port where the ranks meet; by default a free one, or 29500 with --no-ssh.", rich_help_panel=HOSTS_PANEL
    ),
]
