"""The calculator's form: every field of a choice with its label, its options and a hint."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from translution.planner.analysis import OPERATOR_LABELS
from translution.planner.config import PRESET_NAMES
from translution.planner.hardware import load_catalog

from .choice import Choice
from .pasted import MAX_GPUS, MAX_HEADS, MAX_LAYERS, MAX_NODES, MAX_PASTED, MAX_TOKENS, MAX_WIDTH

Options = tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class FormField:
    """One field of the form, with the same name as in `Choice`."""

    name: str
    label: str
    kind: Literal["select", "number", "text", "checkbox", "textarea"] = "number"
    options: Options = ()
    """Values of a select and their labels."""
    hint: str = ""
    minimum: int | None = 1
    maximum: int | None = None
    placeholder: str = ""
    step: str = "1"


@dataclass(frozen=True, slots=True)
class FormSection:
    """A group of fields; `more` holds the advanced ones, which are collapsed, and `own` takes a text of the user."""

    title: str
    fields: tuple[FormField, ...]
    more_title: str
    more: tuple[FormField, ...]
    own_title: str = ""
    own: tuple[FormField, ...] = ()

    def opened(self, choice: Choice) -> bool:
        """Return True if an advanced field differs from its default, so that the group is expanded."""
        return any(field.name in choice.changed for field in self.more)


def _select(name: str, label: str, options: Options, hint: str = "") -> FormField:
    return FormField(name, label, "select", options, hint)


def _own(name: str, label: str, example: str) -> FormField:
    hint = f"YAML or JSON, at most {MAX_PASTED:,} characters; or drop a file on the page"
    return FormField(name, label, "textarea", hint=hint, maximum=MAX_PASTED, placeholder=example)


def _same(*values: str) -> Options:
    return tuple((value, value) for value in values)


def _number(name: str, label: str, maximum: int, placeholder: str, hint: str = "", minimum: int = 1) -> FormField:
    return FormField(name, label, hint=hint, minimum=minimum, maximum=maximum, placeholder=placeholder)


_CHOSEN = (("", "chosen by the search"),)
_PRESET, _SEARCHED = "the model's", "chosen"
_OFFLOADS = (
    ("none", "none"),
    ("cpu-optimizer", "optimizer on the host"),
    ("cpu", "all on the host"),
    ("nvme-optimizer", "optimizer on NVMe"),
    ("nvme", "all on NVMe"),
)
CHECKPOINTING_WORDS = {"none": "none", "block": "per block", "offload": "per block, inputs on the host"}
"""Values of activation checkpointing in words."""
SETTING_WORDS = {
    "stage and offload": "ZeRO stage and offload",
    "overlap_comm": "communication during computation",
    "prefetch_bucket_elements": "elements gathered ahead",
    "reduce_bucket_elements": "elements reduced together",
    "sub_group_elements": "elements updated together",
    "max_reuse_distance_elements": "elements until a gathered tensor is used again",
    "persistence_threshold_elements": "largest tensor that is never partitioned, elements",
    "max_live_elements": "gathered elements at once",
}
"""Settings of a plan in words; those that are words already are absent."""


def _model() -> FormSection:
    fields = (
        _select(
            "model",
            "Model",
            _same(*PRESET_NAMES),
            "size/patch side of 224-pixel images (vit) or of 16-frame clips (video), or size/tokens (gpt)",
        ),
        _select("operator", "Operator", tuple(OPERATOR_LABELS.items())),
    )
    more = (
        _number("dim", "Width", MAX_WIDTH, _PRESET),
        _number("depth", "Layers", MAX_LAYERS, _PRESET),
        _number("heads", "Heads", MAX_HEADS, _PRESET, "must divide the width"),
        _number("image", "Image side", 4096, _PRESET, "pixels; vit only"),
        _number("patch", "Patch side", 4096, _PRESET, "pixels; vit only"),
        _number("context", "Context length", MAX_TOKENS, _PRESET, "tokens; gpt only"),
        FormField(
            "roles", "Projections with a matrix per relation", "text", placeholder="qkv", hint="some of q, k and v"
        ),
        _number("c1", "First low width per head (c1)", 1024, "16", "of α-Translution"),
        _number("c2", "Second low width per head (c2)", 1024, "16", "of α-Translution"),
        _number("window", "Largest distance of a pair of tokens", MAX_TOKENS, "no limit", minimum=0),
        FormField(
            "relative_layers", "Layers with the operator", "text", placeholder="all", hint="all, first:K or every:K"
        ),
        _select("other_layers", "Operator of the other layers", (("", "attention"), ("alpha", "α-Translution"))),
    )
    example = "family: vit\ndim: 384\ndepth: 12\nheads: 6\nimage: 224\npatch: 16\nclasses: 1000"
    own = (_own("model_yaml", "Model file", example),)
    return FormSection("Model", fields, "Change the model", more, "Paste a model of your own", own)


def _cluster() -> FormSection:
    gpus = tuple((name, gpu.title) for name, gpu in load_catalog().gpus.items())
    fields = (
        _select("gpu", "GPU", gpus),
        _number("gpus", "GPUs per node", MAX_GPUS, ""),
        _number("nodes", "Nodes", MAX_NODES, "", "at most; the plan uses fewer if more are not better"),
        FormField("price", "Price of a GPU-hour", placeholder="unknown", hint="in any currency", minimum=0, step="any"),
    )
    more = (
        _number("host_memory", "Host memory per node, GiB", 2**16, "catalog's"),
        FormField(
            "nvme_path", "Folder on NVMe", "text", placeholder="none", hint="on every node; without it, no NVMe is used"
        ),
        FormField("headroom", "Memory to keep free", hint="fraction of every memory", minimum=0, step="0.01"),
        FormField("all_nodes", "Use every node", "checkbox"),
    )
    own = (_own("cluster_yaml", "Cluster file", "base: 2x8xH100\nhost_memory_bytes: 1099511627776"),)
    return FormSection("Cluster", fields, "Memory and drives", more, "Paste a cluster of your own", own)


def _training() -> FormSection:
    fields = (
        _select("precision", "Precision", _same("bf16", "fp16", "fp32")),
        _number("global_batch", "Global batch", 2**20, "8 per GPU", "samples per optimizer step"),
        _select(
            "minimize",
            "Minimize",
            (("time", "time per sample"), ("nodes", "nodes"), ("cost", "nodes × time"), ("memory", "device memory")),
        ),
        _number("steps", "Optimizer steps", 10**9, "", "for the total time"),
    )
    more = (
        _select(
            "optimizer", "Optimizer", (("adamw", "AdamW"), ("lion", "Lion"), ("adagrad", "Adagrad"), ("sgd", "SGD"))
        ),
        _select("stage", "ZeRO stage", _CHOSEN + _same("0", "1", "2", "3")),
        _select("offload", "Offload", _CHOSEN + _OFFLOADS),
        FormField("offload_ratio", "Fraction of the optimizer offloaded", placeholder=_SEARCHED, minimum=0, step="any"),
        _select("checkpointing", "Activation checkpointing", _CHOSEN + tuple(CHECKPOINTING_WORDS.items())),
        _number("tile_relations", "Relations per tile", 2**20, _SEARCHED),
        _number("relation_parallel", "GPUs that share out the relations", 2**16, _SEARCHED, "1 for none"),
        _number("micro_batch", "Micro-batch", 2**16, _SEARCHED, "samples per GPU and forward pass"),
        _number("accumulation", "Micro-batches per optimizer step", 2**16, _SEARCHED),
        FormField(
            "zero",
            "Settings of ZeRO",
            "text",
            placeholder=_SEARCHED,
            hint="name=value,name=value, as --zero takes them",
        ),
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
