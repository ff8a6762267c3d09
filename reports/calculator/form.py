"""The calculator's form: every field of a choice with its label, its options and a hint."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from translution.planner.analysis import OPERATOR_LABELS
from translution.planner.config import PRESET_NAMES
from translution.planner.hardware import load_catalog

from .choice import MAX_GPUS, MAX_HEADS, MAX_LAYERS, MAX_NODES, MAX_TOKENS, MAX_WIDTH, Choice

Options = tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class FormField:
    """One field of the form, with the same name as in `Choice`."""

    name: str
    label: str
    kind: Literal["select", "number", "text", "checkbox"] = "number"
    options: Options = ()
    """Values of a select and their labels."""
    hint: str = ""
    minimum: int | None = 1
    maximum: int | None = None
    placeholder: str = ""
    step: str = "1"


@dataclass(frozen=True, slots=True)
class FormSection:
    """A group of fields; `more` holds the advanced ones, which are collapsed."""

    title: str
    fields: tuple[FormField, ...]
    more_title: str
    more: tuple[FormField, ...]

    def opened(self, choice: Choice) -> bool:
        """Return True if an advanced field differs from its default, so that the group is expanded."""
        return any(field.name in choice.changed for field in self.more)


def _select(name: str, label: str, options: Options, hint: str = "") -> FormField:
    return FormField(name, label, "select", options, hint)


def _same(*values: str) -> Options:
    return tuple((value, value) for value in values)


def _number(name: str, label: str, maximum: int, placeholder: str, hint: str = "", minimum: int = 1) -> FormField:
    return FormField(name, label, hint=hint, minimum=minimum, maximum=maximum, placeholder=placeholder)


_CHOSEN = (("", "chosen by the search"),)
_PRESET, _SEARCHED = "preset's", "chosen"


def _model() -> FormSection:
    fields = (
        _select(
            "model",
            "Model",
            _same(*PRESET_NAMES),
            "vit-size/patch, for 224 pixels; gpt-size/context; video-size/patch, for 16 frames",
        ),
        _select("operator", "Operator", tuple(OPERATOR_LABELS.items())),
    )
    more = (
        _number("dim", "Width", MAX_WIDTH, _PRESET),
        _number("depth", "Layers", MAX_LAYERS, _PRESET),
        _number("heads", "Heads", MAX_HEADS, _PRESET, "must divide the width"),
        _number("image", "Image side", 4096, _PRESET, "pixels; vit only"),
        _number("patch", "Patch side", 4096, _PRESET, "pixels; vit only"),
        _number("context", "Context", MAX_TOKENS, _PRESET, "tokens; gpt only"),
        FormField("roles", "Relative roles", "text", placeholder="qkv", hint="one or more of q, k and v"),
        _number("c1", "c1", 1024, "16", "first low rank per head of α-Translution"),
        _number("c2", "c2", 1024, "16", "second low rank per head of α-Translution"),
        _number("window", "Window", MAX_TOKENS, "none", "pairs farther apart are ignored", 0),
        FormField("relative_layers", "Relative layers", "text", placeholder="all", hint="all, first:K or every:K"),
        _select("other_layers", "Other layers", (("", "attention"), ("alpha", "α-Translution"))),
    )
    return FormSection("Model", fields, "Change the preset", more)


def _cluster() -> FormSection:
    gpus = tuple((name, f"{name}: {gpu.title}") for name, gpu in load_catalog().gpus.items())
    fields = (
        _select("gpu", "GPU", gpus),
        _number("gpus", "GPUs per node", MAX_GPUS, ""),
        _number("nodes", "Nodes", MAX_NODES, "", "at most; the plan uses fewer if more are not better"),
    )
    more = (
        _number("host_memory", "Host memory per node, GiB", 2**16, "catalog's"),
        FormField(
            "nvme_path", "NVMe path", "text", placeholder="none", hint="on every node; without it, no NVMe is used"
        ),
        FormField("headroom", "Headroom", hint="fraction of every memory that stays free", minimum=0, step="0.01"),
        FormField("all_nodes", "Use every node", "checkbox"),
    )
    return FormSection("Cluster", fields, "Memory and drives", more)


def _training() -> FormSection:
    fields = (
        _select("precision", "Precision", _same("bf16", "fp16", "fp32")),
        _number("global_batch", "Global batch", 2**20, "8 per GPU", "samples per optimizer step"),
        _select(
            "minimize",
            "Minimize",
            (("time", "time per sample"), ("nodes", "nodes"), ("cost", "nodes × time"), ("memory", "device memory")),
        ),
    )
    offloads = (
        ("none", "none"),
        ("cpu-optimizer", "optimizer on the host"),
        ("cpu", "optimizer and parameters on the host"),
        ("nvme-optimizer", "optimizer on NVMe"),
        ("nvme", "optimizer and parameters on NVMe"),
    )
    modes = (("none", "none"), ("block", "per block"), ("offload", "per block, inputs on the host"))
    more = (
        _select("optimizer", "Optimizer", _same("adamw", "lion", "adagrad", "sgd")),
        _number("steps", "Steps", 10**9, "", "for the total time"),
        _select("stage", "ZeRO stage", _CHOSEN + _same("0", "1", "2", "3")),
        _select("offload", "Offload", _CHOSEN + offloads),
        _select("checkpointing", "Checkpointing", _CHOSEN + modes),
        _number("tile_relations", "Relations per tile", 2**20, _SEARCHED),
        _number("micro_batch", "Micro-batch", 2**16, _SEARCHED, "samples per GPU and forward pass"),
        _number("accumulation", "Accumulation", 2**16, _SEARCHED, "micro-batches per step"),
    )
    return FormSection("Training", fields, "Fix what the search chooses", more)


def form_sections() -> tuple[FormSection, ...]:
    """Return the groups of fields in order."""
    return _model(), _cluster(), _training()


def value_text(value: object) -> str:
    """Return a value as text for a form or a query; empty for None."""
    if isinstance(value, bool):
        return "true" if value else ""
    return "" if value is None else str(value)
