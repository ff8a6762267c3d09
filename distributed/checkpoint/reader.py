"""Reads a checkpoint parameter by parameter, independent of the ranks, stage and offload it was saved with.

The reader returns the fp32 master copy and the optimizer's moments of each parameter in pieces of any size. Files are
memory-mapped, and those of a rank are opened when one of its elements is read.

Sources: DeepSpeed 0.19.8, runtime/engine.py (file names), runtime/zero/stage3.py, runtime/zero/stage_1_and_2.py,
runtime/bf16_optimizer.py and runtime/fp16/unfused_optimizer.py (their ``state_dict``), and
runtime/swap_tensor/optimizer_utils.py: on NVMe a vector is a file of fp32 values, padded to a multiple of 1024 bytes.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from translution.planner.common import InputError
from translution.planner.costs import QUANTIZED_BLOCK

from .manifest import CheckpointRef
from .shard_layout import Fragment, sub_group_fragments, successive_fragments, untiled_numels, untiled_positions
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
    """The optimizer files of all ranks, opened when needed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._vectors: dict[int, list[FlatVector]] = {}
        self._states: dict[int, Any] = {}

    def state(self, rank: int) -> Any:
        """Saved state of a rank's optimizer."""
        if rank not in self._states:
            found = list(self.folder.glob(f"*zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"))
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


class CheckpointReader:
    """Reads a complete checkpoint.

    Args:
        ref: names the checkpoint.

    Raises:
        InputError: if its files are not those of a checkpoint, or elements of a parameter are missing.
    """

    def __init__(self, ref: CheckpointRef) -> None:
        self.folder, self.world_size = ref.path, ref.manifest.ranks
        models = [self.folder / "mp_rank_00_model_states.pt"]
        models.append(self.folder / f"zero_pp_rank_0_{models[0].name}")
        found = [path for path in models if path.is_file()]
        if not found:
            raise InputError(f"{self.folder}: holds no {models[0].name}: is not a checkpoint")
        model = load_file(found[0])
        self.counters = {name: int(model[name]) for name in _COUNTERS}
        self.shapes: dict[str, torch.Size] = {}
        """Shape of every parameter, by its name in the trained network."""
        self._files = _RankFiles(self.folder)
        if model["optimizer"] is not None:
            fragments = list(self._unpartitioned(model))
        elif found[0] is models[0]:
            fragments = list(self._flat_vectors(model))
        else:
            fragments = list(self._sub_groups(model))
        vectors = self._files.vectors(0)
        self.step, self.kinds = max(vector.step for vector in vectors), vectors[0].kinds
        self._arrange(fragments)

    def _sub_groups(self, model: Any) -> Iterator[tuple[int, int, Fragment]]:
        """ZeRO-3: rank, number of the vector and fragment of each part of a parameter."""
        groups = model["param_shapes"]
        for group in groups:
            self.shapes |= group
        self._take_scales(self._files.state(0).get("loss_scaler"))
        for rank in range(self.world_size):
            for number, group in enumerate(groups):
                numels = {name: shape.numel() for name, shape in group.items()}
                for fragment in sub_group_fragments(numels, self.world_size, rank):
                    yield rank, number, fragment

    def _flat_vectors(self, model: Any) -> Iterator[tuple[int, int, Fragment]]:
        """ZeRO-1 and 2: one vector of all parameters per group, partitioned over the ranks."""
        groups = model["param_shapes"]
        for group in groups:
            self.shapes |= group
        # DeepSpeed's optimizer for bf16 with fp32 accumulation has no loss scaler.
        self._take_scales(self._files.state(0).get("loss_scaler"))
        states = [self._files.state(rank)["param_slice_mappings"] for rank in range(self.world_size)]
        for number in range(len(groups)):
            spans = [{name: (part.start, part.numel) for name, part in state[number].items()} for state in states]
            for rank, fragments in enumerate(successive_fragments(spans)):
                for fragment in fragments:
                    yield rank, number, fragment

    def _unpartitioned(self, model: Any) -> Iterator[tuple[int, int, Fragment]]:
        """Without ZeRO: each parameter is a vector, and rank 0 has all of them."""
        saved = model["optimizer"]
        values = {name: value for name, value in model["module"].items() if name not in model["buffer_names"]}
        self.shapes = {name: value.shape for name, value in values.items()}
        self.scales = {name: saved[name] for name in _SCALES if name in saved}
        masters = saved["fp32_groups"][0] if "fp32_groups" in saved else list(values.values())
        states = saved.get("optimizer_state_dict", saved)["state"]
        vectors = [FlatVector(master, states.get(number, {}), self.folder) for number, master in enumerate(masters)]
        self._files.set_vectors(0, vectors)
        for number, (name, value) in enumerate(values.items()):
            yield 0, number, Fragment(name, 0, value.numel(), 0)

    def _take_scales(self, scaler: object) -> None:
        self.scales = {name: value for name, value in getattr(scaler, "__dict__", {}).items() if name in _SCALES}

    def _arrange(self, fragments: list[tuple[int, int, Fragment]]) -> None:
        """Sort all fragments by their position in the parameters of the untiled network."""
        numels = {name: shape.numel() for name, shape in self.shapes.items()}
        positions = untiled_positions(numels)
        self.numels = untiled_numels(numels)
        """Number of elements of every parameter of the untiled network."""
        self._parts: dict[str, list[VectorPart]] = {name: [] for name in self.numels}
        for rank, number, part in fragments:
            position = positions[part.name]
            start = position.start + part.start
            self._parts[position.name].append(VectorPart(start, part.numel, rank, number, part.offset))
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
