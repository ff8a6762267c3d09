"""Records of the ops found compiled, in the folder of compiled ops: one file for each environment and node.

Comparing a record with the compiled files saves the seconds that loading the ops takes. Environments and nodes that
share the folder keep their own files; processes of one environment change its file one after the other.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import sys
from collections.abc import Mapping
from pathlib import Path

from pydantic import Field, TypeAdapter

from translution.planner.common import InputError, Schema, TranslutionError, parse_json, write_text

from .compile_times import OPS, OpDuration
from .filesystem import locked

_STEM = "translution-prepared"
_DIGEST_LENGTH = 12


def extensions_folder(environment: Mapping[str, str] = os.environ) -> Path:
    """Return the folder where torch stores compiled ops.

    Source: torch 2.13, utils/cpp_extension.py and _appdirs.py.
    """
    cache = Path(environment.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    return Path(environment.get("TORCH_EXTENSIONS_DIR", cache / "torch_extensions"))


class PreparedOps(Schema):
    """Record of the ops that one environment on one node has found compiled."""

    ops: tuple[str, ...] = ()
    """Builder names of the ops."""
    made_with: dict[str, str] = Field(default_factory=dict)
    """Versions and paths that compiled ops depend on, and the node."""
    libraries: dict[str, int] = Field(default_factory=dict)
    """Modification time of each compiled file in ns, by its path."""
    seconds: dict[str, OpDuration] = Field(default_factory=dict)
    """Time that the node took to compile each op when it last did, by builder name."""

    def has(self, op: str, libraries: Mapping[str, int]) -> bool:
        """Return whether an op was found compiled and its library is still the same.

        Args:
            op: name of its builder.
            libraries: the compiled files of today, as `compiled_libraries` returns them.
        """
        return op in self.ops and op in OPS and libraries_of(op, self.libraries) == libraries_of(op, libraries)


_RECORD: TypeAdapter[PreparedOps] = TypeAdapter(PreparedOps)


def compiled_libraries(environment: Mapping[str, str]) -> dict[str, int]:
    """Return the modification time in ns of each compiled file, by its path under the folder of compiled ops."""
    folder, found = extensions_folder(environment), {}
    for path in folder.glob("**/*.so"):
        with contextlib.suppress(OSError):  # Another process may be replacing it.
            found[str(path.relative_to(folder))] = path.stat().st_mtime_ns
    return found


def libraries_of(op: str, libraries: Mapping[str, int]) -> dict[str, int]:
    """Return those of all compiled files that belong to an op, given by its builder's name."""
    return {path: time_ns for path, time_ns in libraries.items() if Path(path).stem == OPS[op].library}


def _made_with(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the versions and paths that compiled ops depend on, in addition to DeepSpeed's sources, and the node."""
    found = {"python": sys.version, "executable": sys.executable, "CXX": environment.get("CXX", "")}
    for package in ("torch", "deepspeed", "ninja"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    # Ninja compiles again what is older than the headers, which a reinstalled package has anew.
    for package in ("torch", "deepspeed"):
        spec = importlib.util.find_spec(package)
        with contextlib.suppress(OSError):
            if spec is not None and spec.origin is not None:
                found[f"{package} files"] = str(Path(spec.origin).stat().st_mtime_ns)
    return found | {"node": platform.node(), "machine": platform.machine()}


def record_path(environment: Mapping[str, str]) -> Path:
    """Return the path of an environment's record for this node."""
    text = json.dumps(_made_with(environment), sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()[:_DIGEST_LENGTH]
    return extensions_folder(environment) / f"{_STEM}-{digest}.json"


def _read(path: Path) -> PreparedOps:
    with contextlib.suppress(OSError, InputError):
        return parse_json(_RECORD, path.read_bytes(), str(path))
    return PreparedOps()


def read_prepared(environment: Mapping[str, str]) -> PreparedOps:
    """Return what an environment has found compiled on this node; an empty record if it has none, or a damaged one."""
    record = _read(record_path(environment))
    return record if record.made_with == _made_with(environment) else PreparedOps()


def read_durations(environment: Mapping[str, str]) -> dict[str, OpDuration]:
    """Return the time that this node took to compile each op in any environment, by builder name.

    The time in the environment's own record counts most, then that of the newest record.
    """
    own, found = record_path(environment), dict[str, OpDuration]()
    times = {}
    for path in own.parent.glob(f"{_STEM}*.json"):
        with contextlib.suppress(OSError):
            times[path] = path.stat().st_mtime_ns
    for path in sorted(times, key=lambda path: (path == own, times[path])):
        # The records of another node may be in a folder that both see.
        record = _read(path)
        found |= record.seconds if record.made_with.get("node") == platform.node() else {}
    return found


def note_prepared(op: str, environment: Mapping[str, str], took: OpDuration | None) -> None:
    """Add an op to an environment's record; ops whose libraries have changed since leave it.

    Args:
        op: name of its builder.
        environment: the environment in which it was loaded.
        took: the time to compile it; None if it was compiled already.
    """
    path = record_path(environment)
    # Another process may read, change and write the record at the same time.
    with contextlib.suppress(OSError, TranslutionError), locked(path.with_suffix(".lock")):
        before, libraries = read_prepared(environment), compiled_libraries(environment)
        ops = {op, *(name for name in before.ops if before.has(name, libraries))}
        record = PreparedOps(
            ops=tuple(sorted(ops)),
            made_with=_made_with(environment),
            libraries=libraries,
            seconds=before.seconds | ({op: took} if took is not None else {}),
        )
        write_text(path, record.model_dump_json(indent=2) + "\n")
