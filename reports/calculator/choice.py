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
    ZeroSpec,
    default_data,
    override,
    preset,
    preset_name,
)
from translution.planner.costs import count_parameters
from translution.planner.hardware import ClusterSpec, find_gpu, named_cluster
from translution.planner.plans import override_zero
from translution.planner.search import (
    HEADROOM,
    Checkpointing,
    Objective,
    SearchConstraints,
    Stage,
    batches,
    check_constraints,
    check_group_size,
    node_counts,
    parse_constraints,
    resolve_global_batch,
    tiles,
)

from .pasted import (
    MAX_GPUS,
    MAX_HEADS,
    MAX_LAYERS,
    MAX_NODES,
    MAX_PASTED,
    MAX_TOKENS,
    MAX_WIDTH,
    pasted_cluster,
    pasted_model,
    spec_file,
)

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


def _pasted(text: str) -> str:
    # A form sends line breaks as CR LF.
    return "\n".join(line.rstrip() for line in text.splitlines()).strip("\n")


Pasted: TypeAlias = Annotated[str, Field(max_length=MAX_PASTED), AfterValidator(_pasted)]
"""A YAML text of the user."""
_KNOB = r"[a-z_.]{1,60}=(true|false|[0-9]{1,12})"


class Choice(Schema):
    """The values of the form; None leaves a field to the preset, to its default, or to the search.

    Numbers may be given as text, as in a query.
    """

    model: Annotated[str, Field(max_length=60), AfterValidator(_plain_model)] = "vit-base/16"
    model_yaml: Pasted | None = None
    """A model of one's own in place of a preset."""
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
    cluster_yaml: Pasted | None = None
    """A cluster of one's own in place of GPU, GPUs per node, nodes and host memory."""
    gpu: Annotated[str, Field(max_length=40), AfterValidator(_plain_gpu)] = "H100"
    gpus: Annotated[int, Field(ge=1, le=MAX_GPUS)] = 8
    """GPUs per node."""
    nodes: Annotated[int, Field(ge=1, le=MAX_NODES)] = 1
    host_memory: int | None = _up_to(2**16)
    """Host memory per node in GiB; None uses the catalog's."""
    price: Annotated[float, Field(gt=0, le=10**6)] | None = None
    """Price of one GPU for one hour, in any currency; None uses the pasted cluster's."""
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
    offload_ratio: Annotated[float, Field(gt=0, le=1)] | None = None
    checkpointing: Checkpointing | None = None
    tile_relations: int | None = _up_to(2**20)
    relation_parallel: int | None = _up_to(2**16)
    micro_batch: int | None = _up_to(2**16)
    accumulation: int | None = _up_to(2**16)
    zero: Annotated[str, Field(max_length=600, pattern=rf"^{_KNOB}(,{_KNOB})*$")] | None = None
    """Fields of ZeRO to use instead of the chosen ones, such as ``overlap_comm=true,sub_group_elements=1000000``."""

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
_CONSTRAINT_FIELDS = (
    "stage", "offload", "offload_ratio", "nvme_path", "checkpointing", "tile_relations", "relation_parallel",
    "micro_batch", "accumulation",
)  # fmt: skip
FIXED_FIELDS = (*(name for name in _CONSTRAINT_FIELDS if name != "nvme_path"), "zero")
"""Fields that the search chooses unless they are given."""
INSTEAD = {"model_yaml": ("model", "operator"), "cluster_yaml": ("gpu", "gpus", "nodes", "host_memory")}
"""Fields that a pasted text takes the place of."""
MAX_PARTS = 100_000
"""Sub-groups, or buckets, that the parameters may be cut into: each takes time and memory to simulate."""
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
    """Return the cluster of a choice.

    Raises:
        InputError: if the pasted cluster is invalid.
    """
    price = {} if choice.price is None else {"price_per_gpu_hour": choice.price}
    if choice.cluster_yaml is not None:
        return pasted_cluster(choice.cluster_yaml).model_copy(update=price)
    cluster = named_cluster(_cluster_name(choice))
    if choice.host_memory is None:
        return cluster.model_copy(update=price)
    size = choice.host_memory * GIB
    name = f"{_cluster_name(choice)}-{choice.host_memory}GiB"
    return cluster.model_copy(update={"host_memory_bytes": size, "name": name} | price)


def _cluster_name(choice: Choice) -> str:
    return f"{choice.nodes}x{choice.gpus}x{choice.gpu}"


def _spec_of(choice: Choice) -> ModelSpec:
    for field, others in INSTEAD.items():
        given = [name for name in others if name in choice.changed] if getattr(choice, field) is not None else []
        if given:
            value = getattr(choice, given[0])
            raise InputError(f"{given[0]}: {value!r} is not allowed: must be left out with {field}, which has it")
    fields = {name: getattr(choice, name) for name in (*_OVERRIDES, *_SETTINGS)}
    if choice.model_yaml is None:
        spec = override(preset(choice.model), **fields)
    else:
        # The operator of the form is its default here, which must not replace the text's.
        spec = override(pasted_model(choice.model_yaml), **fields | {"operator": None})
    if spec.tokens > MAX_TOKENS:
        name = "model_yaml" if choice.model_yaml else "context" if spec.family == "gpt" else "patch"
        raise InputError(f"{name}: {spec.tokens:,} tokens are not allowed: must be at most {MAX_TOKENS:,}")
    return spec


def _overrides(choice: Choice, spec: ModelSpec) -> dict[str, bool | int]:
    """Return the fields of ZeRO that the choice fixes."""
    values: dict[str, bool | int] = {}
    parameters = count_parameters(spec).total
    for pair in (choice.zero or "").split(",") if choice.zero else ():
        name, _, text = pair.partition("=")
        value = text == "true" if text in ("true", "false") else int(text)
        if name in ("sub_group_elements", "reduce_bucket_elements") and value * MAX_PARTS < parameters:
            least = -(-parameters // MAX_PARTS)
            raise InputError(f"zero: {name}: {value:,} is not allowed: must be at least {least:,}")
        values[name] = value
    try:
        override_zero(ZeroSpec(), values)
    except InputError as error:
        raise InputError(f"zero: {str(error).removeprefix('plan: ')}") from None
    return values


def search_input(choice: Choice) -> SearchInput:
    """Return the planner's input for a choice, after all checks that take no search.

    Raises:
        ChoiceError: if a field is invalid; names it.
    """
    try:
        spec, cluster = _spec_of(choice), cluster_of(choice)
        fields = {"precision": choice.precision, "optimizer": choice.optimizer, "steps": choice.steps}
        training = validate(_TRAINING, fields | {"data": default_data(spec)}, "plan", tuple(TrainingSpec.model_fields))
        limits: dict[str, Any] = {name: getattr(choice, name) for name in _LIMITS} | _ignored(choice)
        limits["zero_overrides"] = _overrides(choice, spec)
        if choice.checkpointing is None and spec.checkpointing != "none":
            limits["checkpointing"] = spec.checkpointing
        constraints = parse_constraints(limits, "plan")
        _check(SearchInput(spec, cluster, training, constraints))
    except ChoiceError:
        raise
    except InputError as error:
        raise choice_error(error, choice) from None
    return SearchInput(spec, cluster, training, constraints)


_LIMITS = (*_CONSTRAINT_FIELDS, "global_batch", "all_nodes", "headroom", "minimize")


def _ignored(choice: Choice) -> dict[str, object]:
    """Return the values in place of fields that the form still holds though another one rules them out."""
    ignored: dict[str, object] = {}
    if choice.offload is not None and "nvme" not in choice.offload:
        ignored["nvme_path"] = None
    if choice.all_nodes and choice.minimize == "nodes":
        ignored["minimize"] = "time"
    return ignored


def _check(question: SearchInput) -> None:
    """Raise InputError for input that a search would reject at once."""
    spec, cluster, constraints = question.spec, question.cluster, question.constraints
    check_constraints(constraints)
    check_group_size(spec, cluster, question.training, constraints)
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
    files = spec_files(choice)
    cluster = next((name for name in files if name.startswith("cluster")), _cluster_name(choice))
    model = choice.model if choice.model_yaml is None else "model.json"
    where = _cluster_name(choice) if choice.cluster_yaml is None else "cluster"
    name = f"{model.removesuffix('.json')}-{where}".replace("/", "-")
    words = ["translution", "plan", model, "--cluster", cluster]
    for field in _OVERRIDES:
        if field in changed:
            words += [f"--{field.replace('_', '-')}", str(changed[field])]
    for field in _SETTINGS:
        if field in changed:
            words += ["--set", f"{field}={changed[field]}"]
    words += ["--precision", choice.precision, "--steps", str(choice.steps)]
    if "optimizer" in changed:
        words += ["--train", f"optimizer={choice.optimizer}"]
    for field in (*_CONSTRAINT_FIELDS, "global_batch", "minimize", "headroom"):
        if field in changed and field not in _ignored(choice):
            words += [f"--{field.replace('_', '-')}", str(changed[field])]
    for pair in choice.zero.split(",") if choice.zero else ():
        words += ["--zero", pair]
    return [*words, *(["--all-nodes"] if choice.all_nodes else []), "--out", f"plans/{name}"]


def choice_command(choice: Choice) -> str:
    """Return the command as shell text, after the lines that write the files that it needs."""
    files = "".join(f"cat > {name} <<'END'\n{text}END\n" for name, text in spec_files(choice).items())
    return files + shlex.join(choice_arguments(choice))


def spec_files(choice: Choice) -> dict[str, str]:
    """Return the files that the command reads, by name: of a pasted model, and of a cluster that no name describes."""
    files = {}
    if choice.model_yaml is not None:
        files["model.json"] = spec_file(pasted_model(choice.model_yaml))
    if choice.cluster_yaml is not None:
        files["cluster.json"] = spec_file(cluster_of(choice))
    elif {"host_memory", "price"} & set(choice.changed):
        cluster = cluster_of(choice)
        text = f"base: {_cluster_name(choice)}\nname: {cluster.name}\n"
        text += "" if choice.host_memory is None else f"host_memory_bytes: {cluster.host_memory_bytes}\n"
        files["cluster.yaml"] = text + ("" if choice.price is None else f"price_per_gpu_hour: {choice.price}\n")
    return files
