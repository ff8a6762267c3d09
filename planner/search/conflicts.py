"""Finds constraints of a search that contradict one another, before anything is searched."""

from __future__ import annotations

from ..common.errors import InputError
from ..config.zero import OffloadMode
from .space import SearchConstraints

_OWN_FIELDS = {
    "stage": "stage",
    "offload_optimizer.device": "offload",
    "offload_param.device": "offload",
    "offload_optimizer.ratio": "offload_ratio",
    "offload_optimizer.nvme_path": "nvme_path",
    "offload_param.nvme_path": "nvme_path",
}
"""Knobs of ZeRO that the search decides itself, and the constraints that fix them."""


def check_constraints(constraints: SearchConstraints) -> None:
    """Refuse constraints that no plan can meet, or of which one would be ignored.

    Args:
        constraints: what the user fixes.

    Raises:
        InputError: naming both constraints.
    """
    if constraints.offload is not None:
        OffloadMode.parse(constraints.offload)
    _check_offload(constraints)
    _check_ratio(constraints)
    _check_relation_parallel(constraints)
    _check_nvme_path(constraints)
    if constraints.all_nodes and constraints.minimize == "nodes":
        raise InputError("minimize: 'nodes' is not allowed with all_nodes, which fixes the number of nodes")
    for name in constraints.zero_overrides:
        if name in _OWN_FIELDS:
            raise InputError(f"zero: {name!r} is not allowed: the option {_OWN_FIELDS[name]} gives it")


def _check_offload(constraints: SearchConstraints) -> None:
    stage, offload = constraints.stage, constraints.offload
    allowed = ("none",) if stage == 0 else ("none", "cpu-optimizer") if stage in (1, 2) else tuple(OffloadMode)
    if offload is not None and offload not in allowed:
        raise InputError(f"offload: {offload!r} is not allowed with stage {stage}: must be {' or '.join(allowed)}")
    if constraints.quantized and (stage not in (None, 3) or offload not in (None, "none")):
        other = f"stage {stage}" if stage not in (None, 3) else f"offload {offload}"
        raise InputError(f"quantized: True is not allowed with {other}: must be used with stage 3 and offload none")


def _check_relation_parallel(constraints: SearchConstraints) -> None:
    given = constraints.relation_parallel
    if given is not None and given > 1 and constraints.quantized:
        raise InputError(f"quantized: True is not allowed with relation_parallel {given}: must be used without")
    if given is not None and given > 1 and constraints.offload_ratio not in (None, 1):
        ratio = f"{constraints.offload_ratio:g}"
        raise InputError(f"offload_ratio: {ratio} is not allowed with relation_parallel {given}: must be 1")


def _check_ratio(constraints: SearchConstraints) -> None:
    ratio, offload, stage = constraints.offload_ratio, constraints.offload, constraints.stage
    if ratio is None:
        return
    if offload == "none" or (ratio < 1 and offload not in (None, "cpu-optimizer")):
        raise InputError(
            f"offload_ratio: {ratio:g} is not allowed with offload {offload}: must be used with cpu-optimizer"
        )
    if ratio < 1 and stage not in (None, 3):
        raise InputError(f"offload_ratio: {ratio:g} is not allowed with stage {stage}: must be 1 below stage 3")


def _check_nvme_path(constraints: SearchConstraints) -> None:
    path, offload, stage = constraints.nvme_path, constraints.offload, constraints.stage
    uses_nvme = offload is not None and OffloadMode(offload).uses_nvme
    if uses_nvme and path is None:
        raise InputError(f"nvme_path: is required with offload {offload}: a folder on every node's NVMe drive")
    if path is not None and offload is not None and not uses_nvme:
        raise InputError(f"nvme_path: {path!r} is not allowed with offload {offload}, which puts nothing there")
    if path is not None and stage not in (None, 3):
        raise InputError(f"nvme_path: {path!r} is not allowed with stage {stage}, which puts nothing there")
