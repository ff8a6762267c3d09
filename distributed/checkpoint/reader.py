"""Reads a checkpoint parameter by parameter, independent of the ranks, stage and offload it was saved with.

The reader returns the fp32 master copy and the optimizer's moments of each parameter in pieces of any size. Files are
memory-mapped, and those of a rank are opened when one of its elements is read. Of ranks that share out the relations,
each place in the group has tables of its own relations; the other parameters are read from the first place.

Sources: DeepSpeed 0.19.8, runtime/engine.py (file names), runtime/zero/stage3.py, runtime/zero/stage_1_and_2.py,
runtime/bf16_optimizer.py and runtime/fp16/unfused_optimizer.py (their ``state_dict``), and
runtime/swap_tensor/optimizer_utils.py: on NVMe a vector is a file of fp32 values, padded to a multiple of 1024 bytes.
"""

from __future__ import annotations

import bisect
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from translution.planner.common import InputError
from translution.planner.config import OwnedGeometry, deal_relations, owned_geometry
from translution.planner.costs import QUANTIZED_BLOCK

from .manifest import CheckpointRef
from .shard_layout import (
    Fragment,
    UntiledPosition,
    sub_group_fragments,
    successive_fragments,
    untiled_numels,
    untiled_positions,
)
from .unpickle import load_file

MASTER_COPY = "master"
"""Kind of the values that the optimizer updates; the other kinds are its moments."""
DEVICE_FOLDER = "device"
"""Folder of a checkpoint for moments that a partial offload leaves on the device."""
_COUNTERS = ("global_steps", "global_samples", "skipped_steps")
_SCALES = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
"""State of DeepSpeed's loss scalers."""
_MOMENT_KINDS = {
    "exp_avg": "first", "exp_avg_sq": "second", "sum": "second", "momentum_buffer": "first",
    "state1": "first", "state2": "second",
}  # fmt: skip
"""Kind of a moment by its name in an optimizer's state; Adagrad's has different names in torch and on the host."""
_PLACE = re.compile(r"(?:zero_pp_rank_0_)?mp_rank_(\d+)_model_states\.pt")
"""File of the parameters of a place in the groups of ranks that share out the relations."""
_QUANTIZED = "__bnb_optimizer_quant_state__"
"""Name of the part of a state that bitsandbytes saves as a dictionary of its own."""


def moment_kind(name: str) -> str | None:
    """Return which moment an entry of an optimizer's state is; None for other entries."""
    return _MOMENT_KINDS.get(name)


class VectorPart(NamedTuple):
    """Consecutive elements of a parameter of the untiled network in a rank's flat vector; sorts by `start`."""

    start: int
    """Index of the first element in the parameter."""
    numel: int
    """Number of elements."""
    rank: int
    """Rank that holds them."""
    vector: int
    """Number of the rank's vector."""
    offset: int
    """Index of the first element in the vector."""


class FlatVector:
    """A flat vector of one rank: the master copy and the moments of its elements.

    Args:
        master: the master copy; empty if it was saved from NVMe.
        state: the optimizer's state of the vector.
        swap_folder: folder of the rank's vectors that were saved from NVMe.
    """

    def __init__(self, master: Tensor, state: Mapping[str, Any], swap_folder: Path) -> None:
        state = dict(state) | state.get(_QUANTIZED, {})
        self._scales = {
            kind: (state[f"qmap{number}"], state[f"absmax{number}"])
            for number, kind in ((1, "first"), (2, "second"))
            if f"absmax{number}" in state
        }
        self._tensors = {MASTER_COPY: master}
        self._tensors |= {
            kind: value for name, value in state.items() if (kind := moment_kind(name)) and isinstance(value, Tensor)
        }
        self._swap_folder = swap_folder
        self.step = int(state.get("step", 0))
        """Number of updates that the optimizer has counted."""

    @property
    def kinds(self) -> list[str]:
        """Kinds of the moments."""
        return [kind for kind in self._tensors if kind != MASTER_COPY]

    def read(self, kind: str, start: int, stop: int) -> Tensor:
        """Return consecutive values of a kind; the end of a vector may be padding."""
        values = self._flat(kind)[start:stop]
        if kind not in self._scales:
            return values
        codebook, scales = self._scales[kind]
        blocks = torch.arange(start, stop) // QUANTIZED_BLOCK
        moments: Tensor = codebook[values.long()] * scales[blocks]
        return moments

    def _flat(self, kind: str) -> Tensor:
        """Return a tensor as a flat one, memory-mapped."""
        tensor = self._tensors[kind]
        identity = getattr(tensor, "ds_id", None)
        path = self._swap_folder / f"{identity}.tensor.swp"
        if tensor.numel() == 0 and identity is not None and path.is_file():
            return torch.from_numpy(np.memmap(path, dtype=np.float32, mode="c"))
        return tensor.detach().reshape(-1)


class _RankFiles:
    """The optimizer files of all ranks, opened when needed.

    Args:
        folder: the checkpoint's folder.
        relation_ranks: ranks that share out the relations, G; consecutive ranks are a group.
    """

    def __init__(self, folder: Path, relation_ranks: int) -> None:
        self.folder, self.relation_ranks = folder, relation_ranks
        self._vectors: dict[int, list[FlatVector]] = {}
        self._states: dict[int, Any] = {}

    def state(self, rank: int) -> Any:
        """Saved state of a rank's optimizer."""
        if rank not in self._states:
            replica, place = divmod(rank, self.relation_ranks)
            found = list(self.folder.glob(f"*zero_pp_rank_{replica}_mp_rank_{place:02d}_optim_states.pt"))
            if len(found) != 1:
                raise InputError(f"{self.folder}: holds {len(found)} files with the states of rank {rank}: must hold 1")
            self._states[rank] = load_file(found[0])["optimizer_state_dict"]
        return self._states[rank]

    def vectors(self, rank: int) -> list[FlatVector]:
        """Vectors of a rank, in the order of DeepSpeed's groups."""
        if rank not in self._vectors:
            self._vectors[rank] = list(self._open(rank))
        return self._vectors[rank]

    def set_vectors(self, rank: int, vectors: list[FlatVector]) -> None:
        """Set the vectors of a rank that has no file of its own."""
        self._vectors[rank] = vectors

    def _open(self, rank: int) -> Iterator[FlatVector]:
        saved = self.state(rank)
        masters = saved.get("fp32_flat_groups", saved.get("single_partition_of_fp32_groups"))
        states = saved.get("optimizer_state_dict", saved.get("base_optimizer_state"))["state"]
        device = self.folder / DEVICE_FOLDER / f"rank_{rank}.pt"
        if device.is_file():
            states = states | load_file(device)
        swap_folder = self.folder / "offloaded_tensors" / f"rank{rank:02d}"
        for number, master in enumerate(masters):
            yield FlatVector(master, states.get(number, {}), swap_folder)


class _Found(NamedTuple):
    """A fragment in a vector of a rank."""

    rank: int
    vector: int
    fragment: Fragment


def _parameters(model: Any) -> dict[str, Tensor]:
    """Return the parameters in the file of an optimizer that does not partition them."""
    return {name: value for name, value in model["module"].items() if name not in model["buffer_names"]}


def _saved_numels(model: Any) -> dict[str, int]:
    """Return the number of elements of every parameter of the network that saved a file."""
    if model["optimizer"] is not None:
        return {name: value.numel() for name, value in _parameters(model).items()}
    return {name: shape.numel() for group in model["param_shapes"] for name, shape in group.items()}


def _vector_parts(found: _Found, position: UntiledPosition) -> Iterator[VectorPart]:
    """Yield the elements of a fragment by their place in the parameter of the untiled network."""
    part = found.fragment
    for piece in position.pieces(part.start, part.numel):
        yield VectorPart(piece.start, piece.numel, found.rank, found.vector, part.offset + piece.shift)


class CheckpointReader:
    """Reads a complete checkpoint.

    Args:
        ref: names the checkpoint.

    Raises:
        InputError: if its files are not those of a checkpoint, or elements of a parameter are missing.
    """

    def __init__(self, ref: CheckpointRef) -> None:
        self.folder = ref.path
        models = {int(found[1]): path for path in ref.path.glob("*.pt") if (found := _PLACE.fullmatch(path.name))}
        if sorted(models) != list(range(len(models))) or not models:
            raise InputError(f"{self.folder}: holds no mp_rank_00_model_states.pt: is not a checkpoint")
        self.relation_ranks = len(models)
        """Ranks that share out the relations, G."""
        self.replicas = ref.manifest.ranks // self.relation_ranks
        """Ranks over which ZeRO has partitioned."""
        self.scales: dict[str, Any] = {}
        """State of DeepSpeed's loss scaler."""
        self.numels: dict[str, int] = {}
        """Number of elements of every parameter of the untiled network."""
        self._parts: dict[str, list[VectorPart]] = {}
        self._files = _RankFiles(self.folder, self.relation_ranks)
        for place in range(self.relation_ranks):
            model = load_file(models[place])
            if model["optimizer"] is not None:
                fragments = list(self._unpartitioned(model, place))
            elif models[place].name.startswith("mp_rank"):
                fragments = list(self._flat_vectors(model, place))
            else:
                fragments = list(self._sub_groups(model, place))
            self._add_parts(fragments, _saved_numels(model), self._owned(ref, place))
            if place == 0:
                self.counters = {name: int(model[name]) for name in _COUNTERS}
        vectors = self._files.vectors(0)
        self.step, self.kinds = max(vector.step for vector in vectors), vectors[0].kinds
        self._check_parts()

    def _owned(self, ref: CheckpointRef, place: int) -> OwnedGeometry | None:
        """Return the relations of the ranks at a place of their groups; None if every rank has all."""
        if self.relation_ranks == 1:
            return None
        geometry = ref.plan().model.geometry
        return owned_geometry(geometry, deal_relations(geometry, self.relation_ranks), place)

    def _rank(self, replica: int, place: int) -> int:
        return replica * self.relation_ranks + place

    def _sub_groups(self, model: Any, place: int) -> Iterator[_Found]:
        """ZeRO-3: the parts of a parameter are in vectors of sub-groups."""
        groups = [{name: shape.numel() for name, shape in group.items()} for group in model["param_shapes"]]
        self._take_scales(self._files.state(place).get("loss_scaler"))
        for replica in range(self.replicas):
            for number, numels in enumerate(groups):
                for fragment in sub_group_fragments(numels, self.replicas, replica):
                    yield _Found(self._rank(replica, place), number, fragment)

    def _flat_vectors(self, model: Any, place: int) -> Iterator[_Found]:
        """ZeRO-1 and 2: one vector of all parameters per group, partitioned over the ranks."""
        # DeepSpeed's optimizer for bf16 with fp32 accumulation has no loss scaler.
        self._take_scales(self._files.state(place).get("loss_scaler"))
        ranks = [self._rank(replica, place) for replica in range(self.replicas)]
        states = [self._files.state(rank)["param_slice_mappings"] for rank in ranks]
        for number in range(len(model["param_shapes"])):
            spans = [{name: (part.start, part.numel) for name, part in state[number].items()} for state in states]
            for rank, fragments in zip(ranks, successive_fragments(spans), strict=True):
                for fragment in fragments:
                    yield _Found(rank, number, fragment)

    def _unpartitioned(self, model: Any, place: int) -> Iterator[_Found]:
        """Without ZeRO: each parameter is a vector, and the first replica has all of them."""
        saved, values = model["optimizer"], _parameters(model)
        self.scales = {name: saved[name] for name in _SCALES if name in saved}
        masters = saved["fp32_groups"][0] if "fp32_groups" in saved else list(values.values())
        states = saved.get("optimizer_state_dict", saved)["state"]
        vectors = [FlatVector(master, states.get(number, {}), self.folder) for number, master in enumerate(masters)]
        self._files.set_vectors(place, vectors)
        for number, (name, value) in enumerate(values.items()):
            yield _Found(place, number, Fragment(name, 0, value.numel(), 0))

    def _take_scales(self, scaler: object) -> None:
        self.scales = {name: value for name, value in getattr(scaler, "__dict__", {}).items() if name in _SCALES}

    def _add_parts(self, found: list[_Found], numels: dict[str, int], owned: OwnedGeometry | None) -> None:
        """Note where in the untiled network the fragments of a place are."""
        positions, known = untiled_positions(numels, owned), set(self.numels)
        self.numels |= untiled_numels(numels, owned)
        self._parts |= {name: [] for name in self.numels if name not in known}
        for part in found:
            position = positions[part.fragment.name]
            if position.owned or position.name not in known:
                self._parts[position.name].extend(_vector_parts(part, position))

    def _check_parts(self) -> None:
        """Sort the parts, and check that they are all elements.

        Raises:
            InputError: if elements of a parameter are missing.
        """
        for name, parts in self._parts.items():
            parts.sort()
            end = 0
            for own in parts:
                if own.start != end:
                    raise InputError(f"{self.folder}: holds no elements {end} to {own.start} of {name}")
                end += own.numel
            if end != self.numels[name]:
                raise InputError(f"{self.folder}: holds no elements {end} to {self.numels[name]} of {name}")

    def read(self, name: str, kind: str, start: int, out: Tensor) -> None:
        """Copy consecutive elements of a parameter of the untiled network.

        Args:
            name: name of the parameter.
            kind: `MASTER_COPY` or one of ``kinds``.
            start: index of the first element.
            out: flat tensor, filled completely.
        """
        stop = start + out.numel()
        for part in overlapping_parts(self._parts[name], start, stop):
            low, high = max(part.start, start), min(part.start + part.numel, stop)
            shift = part.offset - part.start
            vector = self._files.vectors(part.rank)[part.vector]
            out[low - start : high - start].copy_(vector.read(kind, shift + low, shift + high))


def overlapping_parts(parts: Sequence[VectorPart], start: int, stop: int) -> Iterator[VectorPart]:
    """Those of the sorted parts that hold an element of a range."""
    begin = max(0, bisect.bisect_right(parts, (start,)) - 1)
    for part in parts[begin:]:
        if part.start >= stop:
            return
        if part.start + part.numel > start:
            yield part
