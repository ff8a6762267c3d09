"""Checksums of a checkpoint: what changes on the drive after saving is found before anything is loaded."""

from __future__ import annotations

import json
import os
import shutil
import zlib
from pathlib import Path

import pytest
import torch
from helpers.runs import run_plan, write_plan

from translution.cli.main import run as run_cli
from translution.distributed.checkpoint.integrity import (
    collect_records,
    file_checksum,
    is_verified,
    note_verified,
    record_own_files,
    verify_checkpoint,
)
from translution.distributed.checkpoint.manifest import (
    MANIFEST,
    CheckpointRef,
    Manifest,
    newest_checkpoint,
    write_manifest,
)
from translution.distributed.runs.folder import CHECKPOINT
from translution.distributed.runs.lock import lock_rank
from translution.planner.common.errors import InputError

FILES = {
    "zero_pp_rank_0_mp_rank_00_model_states.pt": b"a" * 70_000,
    "zero_pp_rank_1_mp_rank_00_model_states.pt": b"b" * 5_000,
    "offloaded_tensors/rank0/1.tensor.swp": b"c" * 100,
    "offloaded_tensors/rank1/1.tensor.swp": b"d" * 100,
    "device/rank_1.pt": b"",
    "zero_to_fp32.py": b"print()",
}


def save(folder: Path, step: int, files: dict[str, bytes] = FILES) -> CheckpointRef:
    """Write a checkpoint of two ranks as they do."""
    path = folder / f"step_{step}"
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    for rank in (1, 0):
        record_own_files(path, rank, 2)
    records = collect_records(path)
    manifest = Manifest(
        step=step,
        ranks=2,
        files={name: record.size_bytes for name, record in records.items()},
        checksums={name: record.crc32 for name, record in records.items()},
    )
    write_manifest(path, manifest)
    found = newest_checkpoint(folder)
    assert found is not None
    return found


def test_files_of_a_group_are_recorded_by_the_rank_that_wrote_them(tmp_path: Path) -> None:
    written = {
        0: ["mp_rank_00_model_states.pt", "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt", "zero_to_fp32.py"],
        1: ["mp_rank_01_model_states.pt", "zero_pp_rank_0_mp_rank_01_optim_states.pt", "device/rank_1.pt"],
        2: ["zero_pp_rank_1_mp_rank_00_optim_states.pt"],
        3: ["zero_pp_rank_1_mp_rank_01_model_states.pt", "offloaded_tensors/rank03/1.tensor.swp"],
    }
    for name in (name for names in written.values() for name in names):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    for rank, names in written.items():
        record_own_files(tmp_path, rank, 4, relation_ranks=2)
        assert set(json.loads((tmp_path / ".sums" / f"rank_{rank}.json").read_text())) == set(names)


def test_every_file_is_recorded_by_the_rank_that_wrote_it(tmp_path: Path) -> None:
    for name, content in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    for rank in (0, 1):
        record_own_files(tmp_path, rank, 2)
    noted = [json.loads((tmp_path / ".sums" / f"rank_{rank}.json").read_text()) for rank in (0, 1)]
    assert set(noted[1]) == {name for name in FILES if "rank_1" in name or "rank1" in name}
    assert {*noted[0], *noted[1]} == set(FILES)
    assert not set(noted[0]) & set(noted[1])
    (tmp_path / "plan.json").write_text("{}")
    records = collect_records(tmp_path)
    assert {name: record.size_bytes for name, record in records.items()} == {
        **{name: len(content) for name, content in FILES.items()},
        "plan.json": 2,
    }
    assert records["zero_to_fp32.py"].crc32 == f"{zlib.crc32(b'print()'):08x}"
    assert not (tmp_path / ".sums").exists()


def test_a_checksum_does_not_depend_on_how_a_file_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = bytes(range(256)) * 400
    (tmp_path / "file").write_bytes(content)
    read: list[int] = []
    monkeypatch.setattr("translution.distributed.checkpoint.integrity._BLOCK_BYTES", 1000)
    assert file_checksum(tmp_path / "file", read.append) == f"{zlib.crc32(content):08x}"
    assert sum(read) == len(content)
    assert len(read) == 103


@pytest.mark.parametrize("name", [name for name, content in FILES.items() if content])
def test_a_single_changed_bit_is_found_and_the_checkpoint_before_is_named(name: str, tmp_path: Path) -> None:
    save(tmp_path, 5)
    found = save(tmp_path, 10)
    verify_checkpoint(found)
    content = bytearray(FILES[name])
    content[len(content) // 2] ^= 1
    (found.path / name).write_bytes(content)
    with pytest.raises(InputError) as raised:
        verify_checkpoint(found)
    assert str(raised.value) == (
        f"{found.path / name}: its content is not what was saved: the checkpoint is damaged; "
        f"remove {found.path} to resume from step_5"
    )


def test_exchanged_and_zeroed_files_are_found(tmp_path: Path) -> None:
    found = save(tmp_path, 5)
    one, two = (found.path / "offloaded_tensors" / f"rank{rank}" / "1.tensor.swp" for rank in (0, 1))
    contents = one.read_bytes(), two.read_bytes()
    one.write_bytes(contents[1])
    two.write_bytes(contents[0])
    with pytest.raises(InputError, match="there is no other complete one"):
        verify_checkpoint(found)
    one.write_bytes(contents[0])
    two.write_bytes(bytes(100))
    with pytest.raises(InputError, match=r"rank1/1.tensor.swp: its content is not what was saved"):
        verify_checkpoint(found)


def test_ranks_share_the_files(tmp_path: Path) -> None:
    found = save(tmp_path, 5)
    (found.path / "zero_to_fp32.py").write_bytes(b"Print()")
    failed = 0
    for part in range(4):
        try:
            verify_checkpoint(found, part=part, parts=4)
        except InputError:
            failed += 1
    assert failed == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: "", "not valid JSON"),
        (lambda text: text[:200], "not valid JSON"),
        (lambda text: text.replace('"ranks": 2', '"ranks": 3'), "its content is not what was saved"),
        (lambda text: text.replace('"step": 5', '"step": 6'), "its content is not what was saved"),
    ],
    ids=["empty", "cut", "ranks", "step"],
)
def test_a_damaged_manifest_is_a_damaged_checkpoint(change: object, message: str, tmp_path: Path) -> None:
    save(tmp_path, 4)
    found = save(tmp_path, 5)
    path = found.path / MANIFEST
    path.write_text(change(path.read_text()))  # type: ignore[operator]
    with pytest.raises(
        InputError, match=rf"{message}.*: the checkpoint is damaged; remove .*step_5 to resume from step_4"
    ):
        newest_checkpoint(tmp_path)


def test_a_checkpoint_under_another_name_is_damaged(tmp_path: Path) -> None:
    found = save(tmp_path, 5)
    found.path.rename(tmp_path / "step_7")
    with pytest.raises(InputError, match=r"manifest.json: is that of step 5: the checkpoint is damaged"):
        newest_checkpoint(tmp_path)


def test_checkpoints_of_earlier_versions_have_sizes_only(tmp_path: Path) -> None:
    found = save(tmp_path, 5)
    old = {"step": 5, "ranks": 2, "files": found.manifest.files}
    (found.path / MANIFEST).write_text(json.dumps(old))
    (found.path / "zero_to_fp32.py").write_bytes(b"Print()")
    again = newest_checkpoint(tmp_path)
    assert again is not None
    verify_checkpoint(again)


def test_the_launcher_tells_the_ranks_what_it_has_verified(tmp_path: Path) -> None:
    found = save(tmp_path / "checkpoint", 5)
    assert not is_verified(tmp_path, found)
    note_verified(tmp_path, found)
    assert is_verified(tmp_path, found)
    assert not is_verified(tmp_path, save(tmp_path / "checkpoint", 6))


@pytest.mark.ranks
def test_a_run_with_a_damaged_checkpoint_is_not_resumed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By the launcher, nor by ranks that start without one; and the command that verifies finds it too."""
    folder = write_plan(tmp_path / "plan", 1, steps=2, final_checkpoint=True)
    run = run_plan(folder, 1)
    assert run_cli(["verify-checkpoint", str(run)]) == 0
    assert "step_2: " in (printed := capsys.readouterr().out)
    assert printed.endswith(", as saved\n")
    damaged = next((run / CHECKPOINT / "step_2").glob("*optim_states.pt"))
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    longer = write_plan(tmp_path / "longer", 1, steps=4)
    shutil.copytree(run, longer / "runs" / "001")
    for command in (["verify-checkpoint", str(longer / "runs" / "001")], ["launch", str(longer), "--resume"]):
        assert run_cli(command) == 2
        error = capsys.readouterr().err
        assert f"{damaged.name}: its content is not what was saved: the checkpoint is damaged; there is no" in error
        # With a torch older than that of new plans a note is above.
        assert [line.partition(":")[0] for line in error.splitlines() if "note: torch " not in line] == ["translution"]
    shutil.copytree(run, longer / "runs" / "by-hand")
    with pytest.raises(AssertionError, match=r"optim_states.pt: its content is not what was saved"):
        run_plan(longer, 1)
    assert run_cli(["verify-checkpoint", str(tmp_path / "plan")]) == 2
    assert run_cli(["launch", str(longer), "--no-verify"]) == 2
    assert "no-verify: is not allowed: must be used with --resume" in capsys.readouterr().err


def test_what_would_run_code_or_still_trains_is_not_resumed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The checksums are right: the file was exchanged together with the manifest."""
    folder = write_plan(tmp_path / "plan", 1, steps=2)
    run = run_plan(folder, 1)
    longer = write_plan(tmp_path / "longer", 1, steps=4)
    copied = Path(shutil.copytree(run, longer / "runs" / "001"))
    lock_rank(copied, 7)
    assert run_cli(["launch", str(longer), "--resume"]) == 2
    assert "is its rank 7\n" in capsys.readouterr().err
    (copied / "control" / "rank_7.lock").unlink()
    found = newest_checkpoint(copied / CHECKPOINT)
    assert found is not None
    path = next(found.path.glob("*optim_states.pt"))
    torch.save({"optimizer_state_dict": Code()}, path)
    name, manifest = path.name, found.manifest
    changed = {
        "files": manifest.files | {name: path.stat().st_size},
        "checksums": manifest.checksums | {name: file_checksum(path)},
    }
    write_manifest(found.path, manifest.model_copy(update=changed))
    for flags in ([], ["--no-verify"]):
        assert run_cli(["launch", str(longer), "--resume", *flags]) == 2
        assert f"{name}: cannot be read: posix.system is not allowed in a checkpoint" in capsys.readouterr().err


class Code:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("true",)
