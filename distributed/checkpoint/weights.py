"""Network files of this project: made from a checkpoint of the authors' code and back, and as a run's first weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from translution.models import load_network, load_published, to_published
from translution.planner.common import InputError, Schema
from translution.planner.config import ModelSpec, network_spec
from translution.planner.plans import Plan

from .exporter import check_new, export, network_metadata, new_file

_FREE = {"name", "checkpointing", "dropout", "token_init_std"}
"""Fields of a spec that may differ between a file of weights and the plan that starts from it."""


class WrittenNetwork(Schema):
    """Description of a network file."""

    out: Path
    """Path of the file."""
    source: Path
    """What it was made from."""
    spec: ModelSpec
    """The network."""
    tensors: int
    """Number of tensors."""
    parameters: int
    """Number of elements of all parameters."""
    file_bytes: int
    """Size of the file in bytes."""


def _described(out: Path, source: Path, spec: ModelSpec, network: nn.Module, tensors: int) -> WrittenNetwork:
    parameters = sum(parameter.numel() for parameter in network.parameters())
    return WrittenNetwork(
        out=out, source=source, spec=spec, tensors=tensors, parameters=parameters, file_bytes=out.stat().st_size
    )


def import_published(
    path: Path, out: Path, *, revision: str | None = None, force: bool = False, **fields: Any
) -> WrittenNetwork:
    """Write a checkpoint of the authors' code as a network file of this project.

    Args:
        path: the checkpoint.
        out: the file to write.
        revision, fields: as in `load_published`.
        force: replace an existing file.

    Raises:
        InputError: as `load_published` does, or if the file exists or cannot be written; no partial file is left.
    """
    check_new(out, force=force)
    spec, network = load_published(path, revision=revision, **fields)
    tensors = {name: value.detach() for name, value in network.named_parameters()}
    with new_file(out) as file:
        save_file(tensors, file.name, network_metadata(spec))
    return _described(out, path, spec, network, len(tensors))


def export_published(source: Path, out: Path, *, best: bool = False, force: bool = False) -> WrittenNetwork:
    """Write a network as a state dict for the authors' present code.

    Args:
        source: a run folder, or a plan folder with runs, whose newest checkpoint is taken, or a network file.
        out: the file to write: safetensors if it ends so, otherwise as torch.save does.
        best: take a run's checkpoint with the best evaluation instead of the newest one.
        force: replace an existing file.

    Raises:
        InputError: if there is no network, the authors' code cannot express it, or the file exists or cannot be
            written.
    """
    check_new(out, force=force)
    if source.is_dir():
        network_file = out.with_name(f".{out.name}.network")
        try:
            export(source, network_file, best=best, force=True)
            return _export_file(network_file, source, out)
        finally:
            network_file.unlink(missing_ok=True)
    if best:
        raise InputError(f"{source}: is not allowed: must be a run folder to export the best checkpoint")
    return _export_file(source, source, out)


def _export_file(path: Path, source: Path, out: Path) -> WrittenNetwork:
    spec, network = network_spec(path), load_network(path)
    state = to_published(network, spec)
    with new_file(out) as file:
        if out.suffix == ".safetensors":
            save_file(state, file.name, {"format": "pt"})
        else:
            torch.save(state, file)
    return _described(out, source, spec, network, len(state))


class WeightsReader:
    """Reads the parameters of a network file, as `CheckpointReader` reads those of a checkpoint.

    Args:
        path: the file.

    Raises:
        InputError: if it is no network file.
    """

    kinds: tuple[str, ...] = ()
    step = 0

    def __init__(self, path: Path) -> None:
        self.folder, self.scales, self.counters = path, dict[str, Any](), dict[str, int]()
        try:
            self._file = safe_open(path, framework="pt", device="cpu").__enter__()
        except (SafetensorError, OSError) as error:
            raise InputError(f"{path}: not a complete safetensors file: {error}") from None
        self.numels = {
            name: torch.Size(self._file.get_slice(name).get_shape()).numel()
            for name in self._file.keys()  # noqa: SIM118  # a handle, not a dict
        }
        self._last: tuple[str, Tensor] | None = None

    def read(self, name: str, kind: str, start: int, out: Tensor) -> None:
        """Copy consecutive elements of a parameter; ``kind`` is always the master copy."""
        del kind
        if self._last is None or self._last[0] != name:
            self._last = name, self._file.get_tensor(name).reshape(-1)
        out.copy_(self._last[1][start : start + out.numel()])


def check_first_weights(path: Path, plan: Plan) -> None:
    """Check that a plan can start from a network file.

    Raises:
        InputError: if there is no such file, or its network is not the plan's.
    """
    spec = network_spec(path)
    asked, had = plan.model.model_dump(), spec.model_dump()
    if plan.model.family != spec.family:
        raise InputError(f"{path}: family: {spec.family!r} is not allowed: the plan's is {plan.model.family!r}")
    for name, value in asked.items():
        if name not in _FREE and value != had[name]:
            raise InputError(f"{path}: {name}: {had[name]!r} is not allowed: the plan's is {value!r}")
