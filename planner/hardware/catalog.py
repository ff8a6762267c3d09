"""GPUs and nodes whose figures vendors publish: read from ``data/clusters.yaml``, each with its source."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias, TypeVar

from pydantic import BeforeValidator, ConfigDict, Field, TypeAdapter

from ..common.errors import InputError
from ..common.schema import Schema, validate

_T = TypeVar("_T")
Generation: TypeAlias = Literal["ampere", "ada", "hopper", "blackwell", "cdna3"]
DATA = Path(__file__).with_name("data")
_CLUSTERS_FILE = "clusters.yaml"


class Entry(Schema):
    """Of a data file; its validator is built when the file is read, which most commands never do."""

    model_config = ConfigDict(defer_build=True)


class FigureSource(Entry):
    """Where a figure was read."""

    title: str
    url: str | None = None


class Figure(Entry):
    """A number and the key of its source."""

    value: Annotated[int | float, Field(gt=0)]
    source: str


def _pair(data: object) -> object:
    """``[value, source]``, as the data file has it."""
    if isinstance(data, list) and len(data) == 2:
        return {"value": data[0], "source": data[1]}
    return data


Sourced: TypeAlias = Annotated[Figure, BeforeValidator(_pair)]


class GpuSpec(Entry):
    """One GPU; rates are dense peaks, and per direction."""

    title: str
    generation: Generation
    node: str
    """The node that a cluster of these GPUs gets unless another is named."""
    memory_bytes: Sourced
    """Total as the driver reports it."""
    bf16_flops_per_s: Sourced
    fp16_flops_per_s: Sourced
    tf32_flops_per_s: Sourced
    fp32_flops_per_s: Sourced
    memory_bytes_per_s: Sourced
    link_bytes_per_s: Sourced
    """To other GPUs of its node, each way."""
    pcie_generation: Sourced


class NodeSpec(Entry):
    """One node; totals are of the whole node, rates per direction."""

    title: str
    gpu: str
    gpus: Sourced
    host_memory_bytes: Sourced
    host_cores: Sourced
    host_memory_bytes_per_s: Sourced
    intra_node_bytes_per_s: Sourced
    """From one GPU to the others, each way."""
    pcie_bytes_per_s: Sourced
    """Between the host and one GPU, each way."""
    nics: Sourced
    """Network adapters that carry the training's traffic."""
    nic_bytes_per_s: Sourced
    """Of one adapter, each way."""
    nvme_bytes: Sourced
    nvme_read_bytes_per_s: Sourced
    """Of all drives together."""
    nvme_write_bytes_per_s: Sourced


class Catalog(Entry):
    """All that the data file holds."""

    sources: dict[str, FigureSource]
    gpus: dict[str, GpuSpec]
    nodes: dict[str, NodeSpec]


@functools.cache
def _parsed(name: str) -> Any:
    import yaml

    # libyaml's loader takes a tenth of the time; a build of PyYAML may lack it.
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    return yaml.load((DATA / name).read_text(encoding="utf-8"), Loader=loader)


def read_data(name: str, adapter: TypeAdapter[_T]) -> _T:
    """A YAML file of the package's data folder, checked."""
    return validate(adapter, _parsed(name), name, ())


@functools.cache
def catalog() -> Catalog:
    """The catalog, read once when first asked for."""
    return read_data(_CLUSTERS_FILE, TypeAdapter(Catalog))


@functools.cache
def _gpu(name: str) -> GpuSpec:
    # To check one entry takes a tenth of the time of checking all.
    return validate(TypeAdapter(GpuSpec), _parsed(_CLUSTERS_FILE)["gpus"][name], f"{_CLUSTERS_FILE}: {name}", ())


@functools.cache
def _node(name: str) -> NodeSpec:
    return validate(TypeAdapter(NodeSpec), _parsed(_CLUSTERS_FILE)["nodes"][name], f"{_CLUSTERS_FILE}: {name}", ())


def nearest_names(name: str, known: Iterable[str]) -> str:
    """Up to three known names close to a mistyped one in any case, as a hint, or nothing."""
    folded = {key.lower(): key for key in known}
    matches = [key for key in folded if name and key.startswith(name.lower())][:3]
    matches = matches or difflib.get_close_matches(name[:60].lower(), folded, n=3, cutoff=0.6)
    if not matches:
        return ""
    *first, last = (repr(folded[match]) for match in matches)
    return f" (did you mean {', '.join(first)}{' or ' if first else ''}{last}?)"


def find_gpu(name: str, what: str = "gpu", others: Iterable[str] = ()) -> tuple[str, GpuSpec]:
    """The GPU of a name in any case, and the name as the catalog writes it.

    Args:
        name: such as ``H100``.
        what: opens the error line.
        others: names that are no GPU's but may have been meant.

    Raises:
        InputError: for an unknown name.
    """
    known = _parsed(_CLUSTERS_FILE)["gpus"]
    key = {key.lower(): key for key in known}.get(name.lower())
    if key is None:
        hint = nearest_names(name, (*known, *others))
        raise InputError(f"{what}: GPU {name[:60]!r} is not allowed: must be one of {', '.join(known)}{hint}")
    return key, _gpu(key)


def find_node(name: str, what: str = "node") -> tuple[str, NodeSpec]:
    """The node of a name in any case, and the name as the catalog writes it.

    Args:
        name: such as ``dgx-h100``.
        what: opens the error line.

    Raises:
        InputError: for an unknown name.
    """
    known = _parsed(_CLUSTERS_FILE)["nodes"]
    key = {key.lower(): key for key in known}.get(name.lower())
    if key is None:
        hint = nearest_names(name, known)
        raise InputError(f"{what}: node {name[:60]!r} is not allowed: must be one of {', '.join(known)}{hint}")
    return key, _node(key)
