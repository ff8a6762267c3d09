"""The user's own model and cluster, pasted as YAML: read with a safe loader, within the form's limits."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache

from translution.planner.common import GIB, InputError, read_yaml
from translution.planner.config import ModelSpec, parse_model_spec
from translution.planner.hardware import ClusterSpec, load_cluster

MAX_PASTED = 4000
"""Characters of a pasted text: the address of the page holds it."""
MAX_TOKENS = 8192
MAX_LAYERS, MAX_WIDTH, MAX_HEADS = 128, 16384, 128
MAX_GPUS, MAX_NODES = 16, 1024
"""Upper bounds of a choice: larger ones would take minutes to search."""


@lru_cache(maxsize=256)
def pasted_model(text: str) -> ModelSpec:
    """Return the model that a text describes.

    Args:
        text: YAML or JSON with the fields of a model file.

    Raises:
        InputError: naming ``model_yaml`` and the first bad field.
    """
    spec = parse_model_spec(_mapping(text, "model_yaml"), "model_yaml")
    limits = {"depth": MAX_LAYERS, "dim": MAX_WIDTH, "head_dim": MAX_WIDTH, "ffn_dim": 8 * MAX_WIDTH}
    for name, most in (limits | {"heads": MAX_HEADS}).items():
        _at_most("model_yaml", name, getattr(spec, name), most)
    return spec


@lru_cache(maxsize=256)
def pasted_cluster(text: str) -> ClusterSpec:
    """Return the cluster that a text describes.

    Args:
        text: YAML or JSON with the fields of a cluster file; ``base`` may name a cluster of GPUs.

    Raises:
        InputError: naming ``cluster_yaml`` and the first bad field.
    """
    data = _mapping(text, "cluster_yaml")
    # This machine is the server, whose size is no affair of the reader's.
    if str(data.get("base", "")).lower().startswith("cpu") or data.get("device") == "cpu":
        raise InputError("cluster_yaml: device: cpu is not allowed: must be a cluster of GPUs")
    try:
        cluster = load_cluster(data)
    except InputError as error:
        raise InputError(f"cluster_yaml: {str(error).removeprefix('cluster: ')}") from None
    _at_most("cluster_yaml", "nodes", cluster.nodes, MAX_NODES)
    _at_most("cluster_yaml", "ranks_per_node", cluster.ranks_per_node, MAX_GPUS)
    for name in ("device_memory_bytes", "host_memory_bytes", "nvme_bytes"):
        size = getattr(cluster, name)
        if size is not None and size < GIB:
            raise InputError(f"cluster_yaml: {name}: {size:,} is not allowed: must be at least {GIB:,}, 1 GiB")
    return cluster


def spec_file(spec: ModelSpec | ClusterSpec) -> str:
    """Return the JSON file of a model or cluster; every line begins with a space, a brace or a bracket."""
    fields = spec.model_dump(mode="json", exclude_none=True, exclude_defaults=True)
    return json.dumps({"name": spec.name} | fields, indent=1) + "\n"


def _mapping(text: str, field: str) -> dict[str, object]:
    data = read_yaml(text, field)
    if not isinstance(data, Mapping):
        raise InputError(f"{field}: {type(data).__name__} is not allowed: must be lines of the form key: value")
    return {str(name): value for name, value in data.items()}


def _at_most(field: str, name: str, value: int, most: int) -> None:
    if value > most:
        raise InputError(f"{field}: {name}: {value:,} is not allowed: must be at most {most:,}")
