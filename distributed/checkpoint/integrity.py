"""Checksums of a checkpoint's files: made by the ranks that write them, and verified before anything is loaded.

A file is flushed and read once by the rank that wrote it. CRC-32 finds what drives and networks do to files; it is no
protection from an attacker.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import zlib
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from translution.planner.common import flush_folder, read_json, usable_cores, write_text

from .manifest import CheckpointRef, FileRecord, damage

_VERIFIED = Path("control") / "verified"
"""File of a run folder that names the checkpoint which the launcher has verified."""
_SUMS = ".sums"
"""Folder of a partial checkpoint with one file per rank that tells what it has written."""
_RANK = re.compile(r"rank_?(\d+)")
_PLACE = re.compile(r"(?:pp_rank_(\d+)_)?mp_rank_(\d+)_")
"""Replica and place in a group of ranks that share out the relations."""
_BLOCK_BYTES = 4 * 2**20

OnBlock = Callable[[int], None]


def file_checksum(path: Path, on_bytes: OnBlock = lambda _: None) -> str:
    """Return the CRC-32 of a file as eight hexadecimal digits.

    Args:
        path: the file.
        on_bytes: called with the number of bytes of each block that was read.
    """
    value = 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            value = zlib.crc32(block, value)
            on_bytes(len(block))
    return f"{value:08x}"


def flush_file(path: Path) -> None:
    """Make the content of a file durable: after a power loss it is there."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _writer(name: str, world_size: int, relation_ranks: int) -> int:
    """Return the rank that wrote a file of a checkpoint, from its name."""
    if place := _PLACE.search(name):
        return int(place[1] or 0) * relation_ranks + int(place[2])
    found = _RANK.search(name)
    return int(found[1]) % world_size if found else 0


def _files(folder: Path) -> Iterable[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file() and path.parent.name != _SUMS)


def record_own_files(folder: Path, rank: int, world_size: int, relation_ranks: int = 1) -> None:
    """Flush the files that this rank has written into a partial checkpoint, and note their sizes and checksums.

    Args:
        folder: the partial checkpoint.
        rank: number of this rank.
        world_size: number of ranks.
        relation_ranks: ranks of a group that share out the relations.
    """
    names = {path.relative_to(folder).as_posix(): path for path in _files(folder)}
    own = {name: path for name, path in names.items() if _writer(name, world_size, relation_ranks) == rank}
    # The drive flushes one file while another one is read from memory.
    with ThreadPoolExecutor(max_workers=1) as pool:
        flushes = [pool.submit(flush_file, path) for path in own.values()]
        records = {name: [path.stat().st_size, file_checksum(path)] for name, path in own.items()}
        for flush in flushes:
            flush.result()
    for parent in {path.parent for path in own.values()}:
        flush_folder(parent)
    (folder / _SUMS).mkdir(exist_ok=True)
    write_text(folder / _SUMS / f"rank_{rank}.json", json.dumps(records))


def collect_records(folder: Path) -> dict[str, FileRecord]:
    """Return what all ranks have noted, and remove their notes; files without a note are read here.

    Args:
        folder: a partial checkpoint whose ranks have called `record_own_files`.
    """
    noted: dict[str, tuple[int, str]] = {}
    for path in sorted((folder / _SUMS).glob("rank_*.json")):
        noted |= {name: (size, checksum) for name, (size, checksum) in read_json(path.read_bytes(), str(path)).items()}
    shutil.rmtree(folder / _SUMS)
    records = {}
    for path in _files(folder):
        name = path.relative_to(folder).as_posix()
        if name not in noted:
            flush_file(path)
            noted[name] = path.stat().st_size, file_checksum(path)
        size, checksum = noted[name]
        records[name] = FileRecord(size_bytes=size, crc32=checksum)
    return records


def verify_checkpoint(ref: CheckpointRef, on_bytes: OnBlock = lambda _: None, *, part: int = 0, parts: int = 1) -> None:
    """Read a checkpoint's files and compare their checksums with the manifest, on all cores.

    Args:
        ref: the checkpoint.
        on_bytes: called with the number of bytes of each block that was read.
        part, parts: only every ``parts``-th file, from number ``part`` on, for ranks that share the work.

    Raises:
        InputError: names the first damaged file, and what to do.
    """
    names = sorted(ref.manifest.checksums)[part::parts]

    def damaged(name: str) -> bool:
        try:
            return file_checksum(ref.path / name, on_bytes) != ref.manifest.checksums[name]
        except OSError:
            return True

    with ThreadPoolExecutor(max_workers=usable_cores()) as pool:
        for name, is_damaged in zip(names, pool.map(damaged, names), strict=True):
            if is_damaged:
                raise damage(ref.folder, ref.tag, f"{ref.path / name}: its content is not what was saved")


def note_verified(run: Path, ref: CheckpointRef) -> None:
    """Tell the ranks of a run that they need not verify a checkpoint."""
    path = run / _VERIFIED
    path.parent.mkdir(exist_ok=True)
    write_text(path, f"{ref.tag} {ref.manifest.digest}\n")


def is_verified(run: Path, ref: CheckpointRef) -> bool:
    """Return True if the launcher has verified a checkpoint, or was asked not to."""
    path = run / _VERIFIED
    return path.is_file() and path.read_text(encoding="utf-8") == f"{ref.tag} {ref.manifest.digest}\n"
