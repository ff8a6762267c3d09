"""Catalog of GPUs and nodes with the figures that vendors publish, read from ``data/clusters.yaml``.

Also the items of the device overhead: intervals of bytes and fractions, and a machine's own figures for them.
"""

from __future__ import annotations

import difflib
import functools
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias, TypeVar

from pydantic import BeforeValidator, ConfigDict, Field, TypeAdapter, model_validator

from ..common.errors import InputError
from ..common.phases import Tier
from ..common.schema import Schema, validate
from ..common.types import Line

_T = TypeVar("_T")
Generation: TypeAlias = Literal["volta", "ampere", "ada", "hopper", "blackwell", "cdna3", "cdna4"]
Fabric: TypeAlias = Literal["nvswitch", "nvlink", "pcie", "xgmi"]
"""What joins the GPUs of a node: NVLink through switches or from one to another, PCIe, or AMD's links."""
DATA = Path(__file__).with_name("data")
_CLUSTERS_FILE = "clusters.yaml"


class Entry(Schema):
    """Base of the entries of a data file; the validator is built only when the file is read, to start faster."""

    model_config = ConfigDict(defer_build=True)


class FigureSource(Entry):
    """The page or document that states a figure."""

    title: str
    url: str | None = None


class Figure(Entry):
    """A number and the key of its source."""

    value: Annotated[int | float, Field(gt=0)]
    source: str


def _pair(data: object) -> object:
    """Convert ``[value, source]``, the form in the data file, to the fields of `Figure`."""
    if isinstance(data, list) and len(data) == 2:
        return {"value": data[0], "source": data[1]}
    return data


Sourced: TypeAlias = Annotated[Figure, BeforeValidator(_pair)]


class GpuSpec(Entry):
    """One GPU; rates are dense peaks, per direction."""

    title: str
    generation: Generation
    fabric: Fabric
    node: str
    """Name of the default node for clusters of this GPU."""
    memory_bytes: Sourced
    """Total bytes of memory that the driver reports."""
    bf16_flops_per_s: Sourced | None = None
    """None if its matrix units do not compute in bf16."""
    fp16_flops_per_s: Sourced
    tf32_flops_per_s: Sourced | None = None
    """None if it computes fp32 products at the rate of fp32."""
    fp32_flops_per_s: Sourced
    matmul_share: Sourced
    """Share of the peak that a training step's large products reach."""
    memory_bytes_per_s: Sourced
    """Memory bandwidth."""
    link_bytes_per_s: Sourced
    """Bandwidth to the other GPUs of the node."""
    pcie_generation: Sourced


class NodeSpec(Entry):
    """One node; totals are of the full node, rates are per direction."""

    title: str
    gpu: str
    """Name of its GPUs in the catalog."""
    gpus: Sourced
    """Number of GPUs."""
    host_memory_bytes: Sourced
    host_cores: Sourced
    host_memory_bytes_per_s: Sourced
    intra_node_bytes_per_s: Sourced
    """Bandwidth from one GPU to the others."""
    pcie_bytes_per_s: Sourced
    """Bandwidth between the host and one GPU."""
    nics: Sourced
    """Number of network adapters that carry training traffic."""
    nic_bytes_per_s: Sourced
    """Bandwidth of one network adapter."""
    nvme_bytes: Sourced
    """Bytes of all NVMe drives."""
    nvme_read_bytes_per_s: Sourced
    """Read bandwidth of all NVMe drives together."""
    nvme_write_bytes_per_s: Sourced
    """Write bandwidth of all NVMe drives together."""


class Catalog(Entry):
    """The content of the data file."""

    sources: dict[str, FigureSource]
    gpus: dict[str, GpuSpec]
    nodes: dict[str, NodeSpec]


@functools.cache
def _parsed(name: str) -> Any:
    # The same content as the YAML file of that name, which takes 30 ms longer to read.
    return json.loads((DATA / name).with_suffix(".json").read_text(encoding="utf-8"))


def read_data(name: str, adapter: TypeAdapter[_T]) -> _T:
    """Return the validated content of a YAML file in the data folder, from the JSON file made of it."""
    return validate(adapter, _parsed(name), name, ())


@functools.cache
def load_catalog() -> Catalog:
    """Return the catalog; it is read at the first call."""
    return read_data(_CLUSTERS_FILE, TypeAdapter(Catalog))


@functools.cache
def _gpu(name: str) -> GpuSpec:
    # Validating one entry needs a tenth of the time of validating all.
    return validate(TypeAdapter(GpuSpec), _parsed(_CLUSTERS_FILE)["gpus"][name], f"{_CLUSTERS_FILE}: {name}", ())


@functools.cache
def _node(name: str) -> NodeSpec:
    return validate(TypeAdapter(NodeSpec), _parsed(_CLUSTERS_FILE)["nodes"][name], f"{_CLUSTERS_FILE}: {name}", ())


def nearest_names(name: str, known: Iterable[str]) -> str:
    """Return a hint with up to three known names close to a mistyped one, ignoring case, or an empty string."""
    folded = {key.lower(): key for key in known}
    matches = [key for key in folded if name and key.startswith(name.lower())][:3]
    matches = matches or difflib.get_close_matches(name[:60].lower(), folded, n=3, cutoff=0.6)
    if not matches:
        return ""
    *first, last = (repr(folded[match]) for match in matches)
    return f" (did you mean {', '.join(first)}{' or ' if first else ''}{last}?)"


def find_gpu(name: str, what: str = "gpu", others: Iterable[str] = ()) -> tuple[str, GpuSpec]:
    """Find a GPU by name, ignoring case; return the catalog's spelling of the name and the GPU.

    Args:
        name: the GPU's name, such as ``H100``.
        what: begins the error line.
        others: names of other things to suggest in the error.

    Raises:
        InputError: if the name is unknown.
    """
    known = _parsed(_CLUSTERS_FILE)["gpus"]
    key = {key.lower(): key for key in known}.get(name.lower())
    if key is None:
        hint = nearest_names(name, (*known, *others))
        raise InputError(
            f"{what}: GPU {name[:60]!r} is not allowed: must be one of {', '.join(known)}{hint}; a cluster file can "
            "describe another one by ranks_per_node, device_memory_bytes and its rates"
        )
    return key, _gpu(key)


def find_node(name: str, what: str = "node") -> tuple[str, NodeSpec]:
    """Find a node by name, ignoring case; return the catalog's spelling of the name and the node.

    Args:
        name: the node's name, such as ``dgx-h100``.
        what: begins the error line.

    Raises:
        InputError: if the name is unknown.
    """
    known = _parsed(_CLUSTERS_FILE)["nodes"]
    key = {key.lower(): key for key in known}.get(name.lower())
    if key is None:
        hint = nearest_names(name, known)
        raise InputError(f"{what}: node {name[:60]!r} is not allowed: must be one of {', '.join(known)}{hint}")
    return key, _node(key)


Level: TypeAlias = Literal["low", "likely", "high"]
"""The low end of an interval, its likely value or its high end."""
Bytes: TypeAlias = Annotated[int, Field(ge=0)]
Fraction: TypeAlias = Annotated[float, Field(ge=0, lt=1)]
ESTIMATE = "estimate, not measured"


class ByteInterval(Schema):
    """A low, a likely and a high number of bytes, in ascending order."""

    low_bytes: Bytes
    likely_bytes: Bytes
    high_bytes: Bytes
    source: Line = "given by the user"

    @model_validator(mode="after")
    def _ordered(self) -> ByteInterval:
        if not self.low_bytes <= self.likely_bytes <= self.high_bytes:
            raise ValueError(
                f"{self.low_bytes}, {self.likely_bytes}, {self.high_bytes} is not allowed: "
                "low_bytes, likely_bytes and high_bytes must be in ascending order"
            )
        return self


class OverheadItem(ByteInterval):
    """One item of the overhead: memory on a rank's device or host that torch's tensors do not account for."""

    name: Line
    tier: Tier = Tier.DEVICE
    in_torch: bool = False
    """Whether torch counts it as allocated memory."""
    formula: Line
    """How the bytes are computed, in words."""
    source: Line
    """Page, file or code that states the figures."""

    def of(self, level: Level) -> int:
        """Return the bytes at one level."""
        return {"low": self.low_bytes, "likely": self.likely_bytes, "high": self.high_bytes}[level]


class FractionInterval(Schema):
    """A low, a likely and a high fraction, in ascending order."""

    low: Fraction
    likely: Fraction
    high: Fraction
    source: Line = "given by the user"

    @model_validator(mode="after")
    def _ordered(self) -> FractionInterval:
        if not self.low <= self.likely <= self.high:
            raise ValueError(
                f"{self.low}, {self.likely}, {self.high} is not allowed: "
                "low, likely and high must be in ascending order"
            )
        return self

    def of(self, level: Level) -> float:
        """Return the fraction at one level."""
        return {"low": self.low, "likely": self.likely, "high": self.high}[level]


def _spread_bytes(data: object) -> object:
    if isinstance(data, int) and not isinstance(data, bool):
        return {"low_bytes": data, "likely_bytes": data, "high_bytes": data}
    return data


def _spread_fraction(data: object) -> object:
    if isinstance(data, int | float) and not isinstance(data, bool):
        return {"low": data, "likely": data, "high": data}
    return data


GivenBytes: TypeAlias = Annotated[ByteInterval, BeforeValidator(_spread_bytes)]
GivenFraction: TypeAlias = Annotated[FractionInterval, BeforeValidator(_spread_fraction)]


class OverheadOverrides(Schema):
    """A machine's own figures: None keeps the item as it is; one number is low, likely and high at once."""

    driver_reserve: GivenBytes | None = None
    context: GivenBytes | None = None
    blas_workspace: GivenBytes | None = None
    nccl: GivenBytes | None = None
    nccl_host: GivenBytes | None = None
    fragmentation: GivenFraction | None = None


_OVERRIDES: TypeAdapter[OverheadOverrides] = TypeAdapter(OverheadOverrides)


def read_overrides(
    data: Mapping[str, object] | OverheadOverrides | None, what: str = "gpu_constants"
) -> OverheadOverrides:
    """Read overrides from a mapping, such as a field of a YAML file.

    Args:
        data: for each name of an item its bytes, or an interval of bytes with a source.
        what: begins the error line.

    Raises:
        InputError: if a key is unknown, or a figure is negative or out of order.
    """
    if isinstance(data, OverheadOverrides):
        return data
    return validate(_OVERRIDES, {} if data is None else data, what, tuple(OverheadOverrides.model_fields))
