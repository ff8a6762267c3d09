"""The calculator's form values, which are the URL's query parameters, and their conversion to the planner's input."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import AfterValidator, Field, TypeAdapter

from translution.planner.common import GIB, InputError, Precision, Schema, validate
from translution.planner.config import (
    GPU_PRECISION,
    ModelSpec,
    Operator,
    Optimizer,
    TrainingSpec,
    default_data,
    override,
    preset,
    preset_name,
)
from translution.planner.hardware import ClusterSpec, find_gpu, named_cluster
from translution.planner.search import (
    HEADROOM,
    Checkpointing,
    Objective,
    SearchConstraints,
    Stage,
    batches,
    check_constraints,
    node_counts,
    parse_constraints,
    resolve_global_batch,
    tiles,
)

MAX_TOKENS = 8192
MAX_LAYERS, MAX_WIDTH, MAX_HEADS = 128, 16384, 128
MAX_GPUS, MAX_NODES = 16, 512
"""Upper bounds of a choice: larger ones would take minutes to search."""

OffloadChoice: TypeAlias = Literal["none", "cpu-optimizer", "cpu", "nvme-optimizer", "nvme"]


def _up_to(most: int, least: int = 1) -> Any:
    return Field(default=None, ge=least, le=most)


def _plain_model(name: str) -> str:
    return preset_name(name) or name


def _plain_gpu(name: str) -> str:
    return find_gpu(name, "gpu")[0]


def _path(text: str) -> str:
    if not text.startswith("/") or not text.isprintable():
        raise ValueError(f"{text!r} is not allowed: must be an absolute path")
    return text


class Choice(Schema):
    """The values of the form; None leaves a field to the preset, to its default, or to the search.

    Numbers may be given as text, as in a query.
    """

    model: Annotated[str, Field(max_length=60), AfterValidator(_plain_model)] = "vit-base/16"
    operator: Operator = "translution"
    dim: int | None = _up_to(MAX_WIDTH)
    depth: int | None = _up_to(MAX_LAYERS)
    heads: int | None = _up_to(MAX_HEADS)
    image: int | None = _up_to(4096)
    """Height and width of the image in pixels."""
    patch: int | None = _up_to(4096)
    context: int | None = _up_to(MAX_TOKENS)
    roles: Annotated[str, Field(max_length=8)] | None = None
    c1: int | None = _up_to(1024)
    c2: int | None = _up_to(1024)
    window: int | None = _up_to(MAX_TOKENS, 0)
    relative_layers: Annotated[str, Field(pattern=r"^(all|(first|every):\d{1,4})$")] | None = None
    other_layers: Literal["attention", "alpha"] | None = None
    gpu: Annotated[str, Field(max_length=40), AfterValidator(_plain_gpu)] = "H100"
    gpus: Annotated[int, Field(ge=1, le=MAX_GPUS)] = 8
    """GPUs per node."""
    nodes: Annotated[int, Field(ge=1, le=MAX_NODES)] = 1
    host_memory: int | None = _up_to(2**16)
    """Host memory per node in GiB; None uses the catalog's."""
    nvme_path: Annotated[str, Field(max_length=200), AfterValidator(_path)] | None = None
    """NVMe folder on every node; it is only written into the plan, never accessed."""
    all_nodes: bool = False
    headroom: Annotated[float, Field(ge=0, le=0.9)] = HEADROOM
    precision: Precision = GPU_PRECISION
    optimizer: Optimizer = "adamw"
    global_batch: int | None = _up_to(2**20)
    steps: Annotated[int, Field(ge=1, le=10**9)] = 10_000
    minimize: Objective = "time"
    stage: Stage | None = None
    offload: OffloadChoice | None = None
    checkpointing: Checkpointing | None = None
    tile_relations: int | None = _up_to(2**20)
    micro_batch: int | None = _up_to(2**16)
    accumulation: int | None = _up_to(2**16)

    @property
    def changed(self) -> dict[str, Any]:
        """Fields that differ from their default, in the order of the form."""
        return {name: value for name, value in self.model_dump().items() if value != _DEFAULTS[name]}

    def replacing(self, **values: object) -> Choice:
        """Return a copy with some fields replaced, without validation: the values must come from a valid choice."""
        return self.model_copy(update=values)


FIELDS = tuple(Choice.model_fields)
_DEFAULTS = {name: field.default for name, field in Choice.model_fields.items()}
_CHOICE: TypeAdapter[Choice] = TypeAdapter(Choice)
_TRAINING: TypeAdapter[TrainingSpec] = TypeAdapter(TrainingSpec)
_OVERRIDES = ("operator", "roles", "c1", "c2", "relative_layers")
_SETTINGS = ("dim", "depth", "heads", "image", "patch", "context", "window", "other_layers")
_CONSTRAINT_FIELDS = ("stage", "offload", "nvme_path", "checkpointing", "tile_relations", "micro_batch", "accumulation")
_ALIASES = {"head_dim": "heads", "ffn_dim": "dim", "cluster": "gpu", "global batch": "global_batch"}
"""Form fields for names in the planner's error lines."""


class ChoiceError(InputError):
    """Raised for a choice that cannot be searched.

    Args:
        message: error line.
        field: form field that the line is about, if any.
    """

    def __init__(self, message: str, field: str | None) -> None:
        super().__init__(message)
        self.message, self.field = message, field


def choice_error(error: InputError, choice: Choice | None = None) -> ChoiceError:
    """Return the planner's error with the form field that it is about.

    Args:
        error: error of the planner.
        choice: the choice, if it was parsed.
    """
    message = re.sub(r"^(choice|plan): ", "", str(error))
    named = re.findall(r"unknown key '([^']*)'|(\w+(?: batch)?): ", message)
    found = next((name for pair in named for name in map(_form_field, pair) if name in FIELDS), None)
    if found in ("patch", "context") and choice is not None and getattr(choice, found) is None:
        found = "model"
    return ChoiceError(message, found)


def _form_field(name: str) -> str:
    return _ALIASES.get(name, name)


def parse_choice(pairs: Iterable[tuple[str, str]]) -> Choice:
    """Parse the URL's query parameters into a `Choice`; empty values are ignored, because forms send them.

    Raises:
        ChoiceError: if a field is invalid; names the first one, its value and what is allowed.
    """
    values: dict[str, str] = {}
    for name, value in pairs:
        if name in values:
            # A name that is no field may hold anything, line breaks included.
            shown = name if name in FIELDS else repr(name[:60])
            raise ChoiceError(f"{shown}: is given twice", name if name in FIELDS else None)
        values[name] = value.strip()
    try:
        data: Mapping[str, object] = {name[:60]: value for name, value in values.items() if value or name not in FIELDS}
        if "stage" in data and re.fullmatch(r"[0-3]", str(data["stage"])):
            data = {**data, "stage": int(values["stage"])}  # Pydantic does not convert text to an integer literal.
        return validate(_CHOICE, data, "choice", FIELDS)
    except InputError as error:
        raise choice_error(error) from None


@dataclass(frozen=True, slots=True)
class SearchInput:
    """A choice as input of the planner."""

    spec: ModelSpec
    cluster: ClusterSpec
    training: TrainingSpec
    constraints: SearchConstraints


def cluster_of(choice: Choice) -> ClusterSpec:
    """Return the cluster of a choice."""
    cluster = named_cluster(f"{choice.nodes}x{choice.gpus}x{choice.gpu}")
    if choice.host_memory is None:
        return cluster
    size = choice.host_memory * GIB
    return cluster.model_copy(update={"host_memory_bytes": size, "name": cluster_file_name(choice)})


def cluster_file_name(choice: Choice) -> str:
    """Return the file name, without suffix, of a cluster with changed host memory."""
    return f"{choice.nodes}x{choice.gpus}x{choice.gpu}-{choice.host_memory}GiB"


def _spec_of(choice: Choice) -> ModelSpec:
    fields = {name: getattr(choice, name) for name in (*_OVERRIDES, *_SETTINGS)}
    spec = override(preset(choice.model), **fields)
    if spec.tokens > MAX_TOKENS:
        name = "context" if spec.family == "gpt" else "patch"
        raise InputError(f"{name}: {spec.tokens:,} tokens are not allowed: must be at most {MAX_TOKENS:,}")
    return spec


def search_input(choice: Choice) -> SearchInput:
    """Return the planner's input for a choice, after all checks that take no search.

    Raises:
        ChoiceError: if a field is invalid; names it.
    """
    try:
        spec, cluster = _spec_of(choice), cluster_of(choice)
        fields = {"precision": choice.precision, "optimizer": choice.optimizer, "steps": choice.steps}
        training = validate(_TRAINING, fields | {"data": default_data(spec)}, "plan", tuple(TrainingSpec.model_fields))
        limits = {
            name: getattr(choice, name) for name in (*_CONSTRAINT_FIELDS, "global_batch", "all_nodes", "headroom")
        }
        constraints = parse_constraints(limits | {"minimize": choice.minimize}, "plan")
        _check(SearchInput(spec, cluster, training, constraints))
    except ChoiceError:
        raise
    except InputError as error:
        raise choice_error(error, choice) from None
    return SearchInput(spec, cluster, training, constraints)


def _check(question: SearchInput) -> None:
    """Raise InputError for input that a search would reject at once."""
    spec, cluster, constraints = question.spec, question.cluster, question.constraints
    check_constraints(constraints)
    tiles(spec, cluster.world_size, 3, constraints)
    batch = resolve_global_batch(constraints, cluster)
    counts = [cluster.ranks_per_node * nodes for nodes in node_counts(cluster, constraints)]
    if not any(batches(constraints, batch, ranks) for ranks in counts):
        raise InputError(
            f"global_batch: {batch} is not allowed: must be a multiple of the {cluster.world_size} ranks, "
            "and of micro_batch and accumulation where they are given"
        )


def choice_arguments(choice: Choice) -> list[str]:
    """Return the command that makes the same plan, as a list of words."""
    changed = choice.changed
    cluster = f"{choice.nodes}x{choice.gpus}x{choice.gpu}"
    name = f"{choice.model}-{cluster}".replace("/", "-")
    words = ["translution", "plan", choice.model]
    words += ["--cluster", cluster if choice.host_memory is None else f"{cluster_file_name(choice)}.yaml"]
    for field in _OVERRIDES:
        if field in changed:
            words += [f"--{field.replace('_', '-')}", str(changed[field])]
    for field in _SETTINGS:
        if field in changed:
            words += ["--set", f"{field}={changed[field]}"]
    words += ["--precision", choice.precision, "--data", "synthetic", "--steps", str(choice.steps)]
    if "optimizer" in changed:
        words += ["--train", f"optimizer={choice.optimizer}"]
    for field in (*_CONSTRAINT_FIELDS, "global_batch", "minimize", "headroom"):
        if field in changed:
            words += [f"--{field.replace('_', '-')}", str(changed[field])]
    return [*words, *(["--all-nodes"] if choice.all_nodes else []), "--out", f"plans/{name}"]


def choice_command(choice: Choice) -> str:
    """Return the command as shell text, after the lines that write the cluster file if one is needed."""
    line = shlex.join(choice_arguments(choice))
    text = cluster_file(choice)
    if text is None:
        return line
    return f"cat > {cluster_file_name(choice)}.yaml <<'END'\n{text}END\n{line}"


def cluster_file(choice: Choice) -> str | None:
    """Return the content of the cluster file for changed host memory; None if the choice does not change it."""
    if choice.host_memory is None:
        return None
    base = f"{choice.nodes}x{choice.gpus}x{choice.gpu}"
    return f"base: {base}\nhost_memory_bytes: {choice.host_memory * GIB}\n"
