"""Reads memory snapshots of torch: what its allocator did on one GPU, and which code asked for the memory.

``torch.cuda.memory._dump_snapshot`` writes a pickle of dicts, lists, texts and numbers. It may come from anywhere, so
it is read without Python's unpickler, by a small machine that knows the instructions for those values and no others.
The same content as JSON is read too. Format: torch 2.13, torch/cuda/memory.py, ``_snapshot``.
"""

from __future__ import annotations

import io
import pickletools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, NonNegativeInt, TypeAdapter, ValidationError

from translution.planner.common import InputError, read_json
from translution.planner.memory import Timeline, make_timeline
from translution.planner.simulator import Event

from ..render.document import read_input

MAX_BYTES, MAX_EVENTS = 2**30, 2_000_000
"""Largest file, and largest number of events, that are read."""
_FRAMES = 64
"""Innermost stack frames that are searched for code outside torch."""
_MAX_CODES = 40
"""Number of places in the code that are told apart."""
BEFORE, UNKNOWN, OTHER = "before the recording", "code not recorded", "other code"
"""Categories of memory that was live when the recording began, of memory without a stack, and of all further code."""
_PHASE = "recorded"
_ALLOCATED = "active_allocated"


class _Recorded(BaseModel):
    """Part of a snapshot; keys that are not used here are ignored, since each version of torch adds some."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)


class _Block(_Recorded):
    size: NonNegativeInt
    requested_size: NonNegativeInt | None = None
    state: str

    @property
    def bytes(self) -> int:
        """Requested bytes, as events count them; versions without them have the rounded size."""
        return self.size if self.requested_size is None else self.requested_size


class _Segment(_Recorded):
    device: int = 0
    total_size: NonNegativeInt
    blocks: list[_Block] = []


class _Entry(_Recorded):
    action: str
    size: NonNegativeInt = 0
    addr: int = 0
    device_free: NonNegativeInt | None = None
    frames: Any = None


_Part = TypeVar("_Part", _Segment, _Entry)
_SEGMENTS: TypeAdapter[list[_Segment]] = TypeAdapter(list[_Segment])
_ENTRIES: TypeAdapter[list[_Entry]] = TypeAdapter(list[_Entry])


@dataclass(frozen=True, slots=True)
class TorchSnapshot:
    """What torch's allocator did on one GPU while it was recorded."""

    device: int
    """Number of the GPU."""
    timeline: Timeline
    """Allocated bytes by the code that asked for them, over the allocations and releases."""
    start_bytes: int
    """Allocated bytes when the recording began."""
    end_bytes: int
    """Allocated bytes when the snapshot was taken."""
    reserved_bytes: int
    """Bytes that torch held from the driver when the snapshot was taken."""
    failed_bytes: int | None
    """Size of the last allocation that failed, if one did."""


class _Machine:
    """Executes the instructions of a pickle that make dicts, lists, tuples, texts and numbers; refuses all others.

    Keys must be texts, so that no value is hashed whose hash takes long.
    """

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}
        self._known: dict[str, Callable[[Any], None]] = {
            **dict.fromkeys(("PROTO", "FRAME"), lambda _: None),
            **dict.fromkeys(
                ("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
                self.stack.append,
            ),
            "NONE": lambda _: self.stack.append(None),
            "NEWTRUE": lambda _: self.stack.append(True),
            "NEWFALSE": lambda _: self.stack.append(False),
            "EMPTY_DICT": lambda _: self.stack.append({}),
            "EMPTY_LIST": lambda _: self.stack.append([]),
            "EMPTY_TUPLE": lambda _: self.stack.append(()),
            "MARK": lambda _: self._marks.append(len(self.stack)),
            "TUPLE": lambda _: self.stack.append(tuple(self._pop_to_mark())),
            "TUPLE1": lambda _: self.stack.append(tuple(self._pop(1))),
            "TUPLE2": lambda _: self.stack.append(tuple(self._pop(2))),
            "TUPLE3": lambda _: self.stack.append(tuple(self._pop(3))),
            "APPEND": lambda _: self._append(self._pop(1)),
            "APPENDS": lambda _: self._append(self._pop_to_mark()),
            "SETITEM": lambda _: self._set(self._pop(2)),
            "SETITEMS": lambda _: self._set(self._pop_to_mark()),
            "MEMOIZE": lambda _: self._memo.update({len(self._memo): self.stack[-1]}),
            **dict.fromkeys(("BINPUT", "LONG_BINPUT"), lambda number: self._memo.update({number: self.stack[-1]})),
            **dict.fromkeys(("BINGET", "LONG_BINGET"), lambda number: self.stack.append(self._memo[number])),
        }

    def _pop(self, count: int) -> list[Any]:
        found = self.stack[-count:]
        if len(found) < count:
            raise ValueError("a value is missing")
        del self.stack[-count:]
        return found

    def _pop_to_mark(self) -> list[Any]:
        start = self._marks.pop()
        found = self.stack[start:]
        del self.stack[start:]
        return found

    def _append(self, values: list[Any]) -> None:
        if type(self.stack[-1]) is not list:
            raise ValueError("values are appended to something else than a list")
        self.stack[-1].extend(values)

    def _set(self, values: list[Any]) -> None:
        if type(self.stack[-1]) is not dict or len(values) % 2 or any(type(key) is not str for key in values[::2]):
            raise ValueError("keys must be texts of a dict")
        self.stack[-1].update(zip(values[::2], values[1::2], strict=True))

    def run(self, content: bytes) -> object:
        """Return the value that a pickle makes.

        Raises:
            ValueError, IndexError, KeyError: if the pickle is damaged or has another instruction.
        """
        for code, argument, _ in pickletools.genops(io.BytesIO(content)):
            if code.name == "STOP":
                (value,) = self.stack
                return value
            if code.name not in self._known:
                raise ValueError(f"{code.name} is not allowed: only dicts, lists, tuples, texts and numbers are")
            self._known[code.name](argument)
        raise ValueError("its end is missing")


def _load(path: Path) -> object:
    content = read_input(path)
    if len(content) > MAX_BYTES:
        raise InputError(f"{path}: {len(content):,} bytes are not allowed: a snapshot has at most {MAX_BYTES:,}")
    if content[:1] == b"\x80":
        try:
            return _Machine().run(content)
        except (ValueError, IndexError, KeyError, OverflowError, MemoryError) as error:
            reason = " ".join(str(error).split())[:200]
            raise InputError(f"{path}: is not a memory snapshot of torch: {reason}") from None
    try:
        text = content.decode()
    except UnicodeDecodeError:
        raise InputError(f"{path}: is not a memory snapshot of torch: neither a pickle nor JSON") from None
    return read_json(text, str(path))


def _parsed(adapter: TypeAdapter[list[_Part]], value: object, path: Path, key: str) -> list[_Part]:
    if not isinstance(value, list):
        raise InputError(f"{path}: {key}: must be a list")
    blocks = [each.get("blocks") for each in value if isinstance(each, dict)]
    count = max(len(value), sum(len(each) for each in blocks if isinstance(each, list)))
    if count > MAX_EVENTS:
        raise InputError(f"{path}: {key}: {count:,} entries are not allowed: at most {MAX_EVENTS:,}")
    try:
        return adapter.validate_python(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        raise InputError(f"{path}: {key}.{place}: {' '.join(first['msg'].split())}") from None


@lru_cache(maxsize=4096)
def _place(file: str, name: str) -> tuple[str, bool]:
    """Return a frame as file and function, and whether it is Python code outside torch."""
    path = PurePosixPath(file.replace("\\", "/"))
    return f"{path.name}: {name}", path.suffix == ".py" and "torch" not in path.parts


def _code_of(frames: object) -> str:
    """Return the innermost frame outside torch as file and function, or else the innermost one."""
    first = None
    for frame in frames[:_FRAMES] if isinstance(frames, list) else ():
        name, file = (frame.get("name"), frame.get("filename")) if isinstance(frame, dict) else (None, None)
        if not isinstance(name, str) or not isinstance(file, str):
            continue
        text, outside = _place(file[-300:], name[-80:])
        if outside:
            return text
        first = first or text
    return first or UNKNOWN


def _codes(entries: Sequence[_Entry]) -> list[str]:
    """Return the code that asked for each entry's memory: by name if it is among those that asked for the most."""
    codes = [_code_of(entry.frames) if entry.action == "alloc" else "" for entry in entries]
    sizes: Counter[str] = Counter()
    for code, entry in zip(codes, entries, strict=True):
        sizes[code] += entry.size
    named = {code for code, _ in sizes.most_common(_MAX_CODES)}
    return [code if code in named else OTHER for code in codes]


def _events(entries: Sequence[_Entry]) -> tuple[list[Event], int]:
    """Return the allocations and releases, and the bytes that were live before and released.

    Torch counts memory as allocated until its release is requested.
    """
    live: dict[int, tuple[str, int]] = {}
    events: list[Event] = []
    before = 0
    for code, entry in zip(_codes(entries), entries, strict=True):
        if entry.action == "alloc":
            live[entry.addr] = code, entry.size
            events.append((_PHASE, "", code, entry.size))
        elif entry.action == "free_requested":
            known = live.pop(entry.addr, None)
            what, size = known or (BEFORE, entry.size)
            before += 0 if known else size
            events.append((_PHASE, "", what, -size))
    return events, before


def read_snapshot(path: Path) -> TorchSnapshot:
    """Read a snapshot of torch's allocator; of several GPUs, that with the most events.

    Args:
        path: file of ``torch.cuda.memory._dump_snapshot``, or the same content as JSON.

    Raises:
        InputError: if the file is missing, damaged, of another kind, or recorded no allocation.
    """
    content = _load(path)
    if not isinstance(content, dict):
        raise InputError(f"{path}: is not a memory snapshot of torch: must be a dict")
    traces = content.get("device_traces")
    if not isinstance(traces, list) or not traces or not all(isinstance(trace, list) for trace in traces):
        raise InputError(f"{path}: device_traces: must be a list with a list for each GPU")
    device = max(range(len(traces)), key=lambda number: len(traces[number]))
    entries = _parsed(_ENTRIES, traces[device], path, f"device_traces.{device}")
    segments = [
        segment for segment in _parsed(_SEGMENTS, content.get("segments"), path, "segments") if segment.device == device
    ]
    events, released = _events(entries)
    if not events:
        raise InputError(
            f"{path}: device_traces: holds no allocation: call torch.cuda.memory._record_memory_history() first"
        )
    at_end = sum(block.bytes for segment in segments for block in segment.blocks if block.state == _ALLOCATED)
    # What is live at the end, without what the events changed, was live before.
    at_start = max(released, at_end - sum(event[3] for event in events))
    failed = [entry.size for entry in entries if entry.action == "oom"]
    return TorchSnapshot(
        device=device,
        timeline=make_timeline(events, {BEFORE: at_start} if at_start else {}),
        start_bytes=at_start,
        end_bytes=at_start + sum(event[3] for event in events),
        reserved_bytes=sum(segment.total_size for segment in segments),
        failed_bytes=failed[-1] if failed else None,
    )
