"""A checkpoint as its parameters, whatever ranks, stage and offload it was saved with.

Of every parameter it gives the fp32 master copy and the optimizer's moments, in pieces of any size: files are mapped
into memory, and those of a rank are opened when one of its elements is asked for.

Sources: DeepSpeed 0.19.8, runtime/engine.py (file names), runtime/zero/stage3.py, runtime/zero/stage_1_and_2.py,
runtime/bf16_optimizer.py and runtime/fp16/unfused_optimizer.py (their ``state_dict``), and
runtime/swap_tensor/optimizer_utils.py: on NVMe a vector is a file of fp32 values, padded to 1024 bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from translution.planner.common.errors import InputError

from .manifest import Saved
from .shard_layout import Fragment, sub_group_fragments, successive_fragments, whole_numels, whole_places
from .unpickle import load_file

MASTER = "master"
"""The name, beside the moments', of the values that the optimizer updates."""
DEVICE = "device"
COUNTERS = ("global_steps", "global_samples", "skipped_steps")
SCALES = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
"""What DeepSpeed's loss scalers keep from step to step."""
_KINDS = {"exp_avg": "first", "exp_avg_sq": "second", "sum": "second", "momentum_buffer": "first"}
"""Moments by the name that an optimizer gives them: Adagrad's has one name in torch and one on the host."""


def kind_of(name: str) -> str | None:
    """Which moment an entry of an optimizer's state is; None if it is none."""
    return _KINDS.get(name)


class Vector:
    """A flat vector of one rank: the master copy, and the moments beside it."""

    def __init__(self, master: Tensor, state: Mapping[str, Any], swapped: Path) -> None:
        self._tensors = {MASTER: master}
        self._tensors |= {
            kind: value for name, value in state.items() if (kind := kind_of(name)) and isinstance(value, Tensor)
        }
        self._swapped = swapped
        self.step = int(state.get("step", 0))

    @property
    def kinds(self) -> list[str]:
        """The moments."""
        return [kind for kind in self._tensors if kind != MASTER]

    def values(self, kind: str) -> Tensor:
        """Flat values, mapped and not read yet, whose end may be padding."""
        tensor = self._tensors[kind]
        identity = getattr(tensor, "ds_id", None)
        path = self._swapped / f"{identity}.tensor.swp"
        if tensor.numel() == 0 and identity is not None and path.is_file():
            return torch.from_numpy(np.memmap(path, dtype=np.float32, mode="c"))
        return tensor.detach().reshape(-1)


class _Vectors:
    """All ranks' vectors, opened when needed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._known: dict[int, list[Vector]] = {}
        self._states: dict[int, Any] = {}

    def state(self, rank: int) -> Any:
        """What a rank's optimizer saved."""
        if rank not in self._states:
            found = list(self.folder.glob(f"*zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"))
            if len(found) != 1:
                raise InputError(f"{self.folder}: holds {len(found)} files with the states of rank {rank}: must hold 1")
            self._states[rank] = load_file(found[0])["optimizer_state_dict"]
        return self._states[rank]

    def of(self, rank: int) -> list[Vector]:
        """A rank's vectors, in order."""
        if rank not in self._known:
            self._known[rank] = list(self._open(rank))
        return self._known[rank]

    def _open(self, rank: int) -> Iterator[Vector]:
        saved = self.state(rank)
        masters = saved.get("fp32_flat_groups", saved.get("single_partition_of_fp32_groups"))
        states = saved.get("optimizer_state_dict", saved.get("base_optimizer_state"))["state"]
        device = self.folder / DEVICE / f"rank_{rank}.pt"
        if device.is_file():
            states = states | load_file(device)
        swapped = self.folder / "offloaded_tensors" / f"rank{rank:02d}"
        for number, master in enumerate(masters):
            yield Vector(master, states.get(number, {}), swapped)


class Stored:
    """A whole checkpoint that is read from.

    Args:
        saved: which one.

    Raises:
        InputError: if its files are not those of a checkpoint, or elements of a parameter are missing.
    """

    def __init__(self, saved: Saved) -> None:
        self.folder, self.ranks = saved.folder / saved.tag, saved.manifest.ranks
        models = [self.folder / "mp_rank_00_model_states.pt"]
        models.append(self.folder / f"zero_pp_rank_0_{models[0].name}")
        found = [path for path in models if path.is_file()]
        if not found:
            raise InputError(f"{self.folder}: holds no {models[0].name}: is not a checkpoint")
        model = load_file(found[0])
        self.counters = {name: int(model[name]) for name in COUNTERS}
        self.shapes: dict[str, torch.Size] = {}
        """Of every parameter, by its name in the network that was trained."""
        self._vectors = _Vectors(self.folder)
        if model["optimizer"] is not None:
            fragments = list(self._whole(model))
        elif found[0] is models[0]:
            fragments = list(self._flat(model))
        else:
            fragments = list(self._sub_groups(model))
        vectors = self._vectors.of(0)
        self.step, self.kinds = max(vector.step for vector in vectors), vectors[0].kinds
        self._arrange(fragments)

    def _sub_groups(self, model: Any) -> Iterator[tuple[int, int, Fragment]]:
        groups = model["param_shapes"]
        for group in groups:
            self.shapes |= group
        self._take_scales(self._vectors.state(0).get("loss_scaler"))
        for rank in range(self.ranks):
            for number, group in enumerate(groups):
                numels = {name: shape.numel() for name, shape in group.items()}
                for fragment in sub_group_fragments(numels, self.ranks, rank):
                    yield rank, number, fragment

    def _flat(self, model: Any) -> Iterator[tuple[int, int, Fragment]]:
        groups = model["param_shapes"]
        for group in groups:
            self.shapes |= group
        # DeepSpeed's optimizer for bf16 with fp32 accumulation has none.
        self._take_scales(self._vectors.state(0).get("loss_scaler"))
        states = [self._vectors.state(rank)["param_slice_mappings"] for rank in range(self.ranks)]
        for number in range(len(groups)):
            spans = [{name: (part.start, part.numel) for name, part in state[number].items()} for state in states]
            for rank, fragments in enumerate(successive_fragments(spans)):
                for fragment in fragments:
                    yield rank, number, fragment

    def _whole(self, model: Any) -> Iterator[tuple[int, int, Fragment]]:
        """Without ZeRO: every parameter is a vector, and rank 0 has them all."""
        saved = model["optimizer"]
        values = {name: value for name, value in model["module"].items() if name not in model["buffer_names"]}
        self.shapes = {name: value.shape for name, value in values.items()}
        self.scales = {name: saved[name] for name in SCALES if name in saved}
        masters = saved["fp32_groups"][0] if "fp32_groups" in saved else list(values.values())
        states = saved.get("optimizer_state_dict", saved)["state"]
        self._vectors._known[0] = [
            Vector(master, states.get(number, {}), self.folder) for number, master in enumerate(masters)
        ]
        for number, (name, value) in enumerate(values.items()):
            yield 0, number, Fragment(name, 0, value.numel(), 0)

    def _take_scales(self, scaler: object) -> None:
        self.scales = {name: value for name, value in getattr(scaler, "__dict__", {}).items() if name in SCALES}

    def _arrange(self, fragments: list[tuple[int, int, Fragment]]) -> None:
        """Sort all fragments by where they lie in the untiled network's parameters."""
        numels = {name: shape.numel() for name, shape in self.shapes.items()}
        places = whole_places(numels)
        self.numels = whole_numels(numels)
        """Elements of every parameter of the untiled network."""
        self._parts: dict[str, list[tuple[int, int, int, int, int]]] = {name: [] for name in self.numels}
        for rank, number, part in fragments:
            place = places[part.name]
            self._parts[place.name].append((place.start + part.start, part.numel, rank, number, part.offset))
        for name, parts in self._parts.items():
            parts.sort()
            end = 0
            for start, numel, *_ in parts:
                if start != end:
                    raise InputError(f"{self.folder}: holds no elements {end} to {start} of {name}")
                end += numel
            if end != self.numels[name]:
                raise InputError(f"{self.folder}: holds no elements {end} to {self.numels[name]} of {name}")

    def read(self, name: str, kind: str, start: int, out: Tensor) -> None:
        """Copy consecutive elements of a parameter of the untiled network.

        Args:
            name: of the parameter.
            kind: `MASTER` or one of ``kinds``.
            start: the first element.
            out: flat, filled whole.
        """
        stop = start + out.numel()
        for first, numel, rank, number, offset in overlapping(self._parts[name], start, stop):
            low, high = max(first, start), min(first + numel, stop)
            values = self._vectors.of(rank)[number].values(kind)
            out[low - start : high - start].copy_(values[offset + low - first : offset + high - first])


def overlapping(
    parts: Sequence[tuple[int, int, int, int, int]], start: int, stop: int
) -> Iterator[tuple[int, int, int, int, int]]:
    """The parts, sorted by their first element, that hold an element of a range."""
    import bisect

    begin = max(0, bisect.bisect_right(parts, (start,)) - 1)
    for part in parts[begin:]:
        if part[0] >= stop:
            return
        if part[0] + part[1] > start:
            yield part
