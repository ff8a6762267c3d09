"""Windows of tokens from files and from the standard library."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.runs import write_plan

from translution.distributed.data.base import DataSource
from translution.distributed.data.batching import micro_batches
from translution.distributed.data.loaders import load_samples
from translution.distributed.data.tokens import RandomWindows, TokenWindows, load_stdlib, stdlib_files
from translution.distributed.preflight.checks import check_node
from translution.planner.common.errors import InputError
from translution.planner.config.model import parse_model_spec
from translution.planner.config.training import TrainingSpec
from translution.planner.plans.plan import load_plan

MODEL = {"family": "gpt", "context": 8, "vocabulary": 256, "dim": 8, "depth": 1, "heads": 1}


def load(path: Path, **model: object) -> tuple[DataSource, DataSource]:
    return load_samples(parse_model_spec(MODEL | model), TrainingSpec(data="tokens", data_path=str(path)))


def write(folder: Path, training: list[int], **meta: object) -> Path:
    folder.mkdir(exist_ok=True)
    dtype = np.dtype(str(meta.get("dtype", "uint16")))
    np.array(training, dtype=dtype).tofile(folder / "train.bin")
    np.arange(9, dtype=dtype).tofile(folder / "val.bin")
    if meta:
        (folder / "meta.json").write_text(json.dumps(meta))
    return folder


def test_windows_are_consecutive_and_predict_the_next_token(tmp_path: Path) -> None:
    training, held_out = load(write(tmp_path, list(range(100))))
    assert (len(training), len(held_out)) == (12, 1)
    batch = training.select(torch.tensor([11, 0]))
    assert batch.inputs.tolist() == [list(range(88, 96)), list(range(8))]
    assert batch.targets.tolist() == [list(range(89, 97)), list(range(1, 9))]
    assert batch.inputs.dtype == batch.targets.dtype == torch.int64


def test_ranks_share_an_epoch_of_windows_and_resume_within_it(tmp_path: Path) -> None:
    training, _ = load(write(tmp_path, list(range(97))))

    def starts(ranks: int, first: int, count: int) -> list[list[int]]:
        streams = [
            micro_batches(
                training,
                micro_batch=6 // ranks,
                gradient_accumulation_steps=1,
                rank=rank,
                world_size=ranks,
                seed=1,
                first_step=first,
            )
            for rank in range(ranks)
        ]
        return [[int(n) for stream in streams for n in next(stream)[0].inputs[:, 0]] for _ in range(count)]

    expected = starts(1, 0, 6)
    assert expected == starts(2, 0, 6) == starts(3, 0, 6)
    assert expected[3:] == starts(2, 3, 3)
    assert sorted(expected[0] + expected[1]) == sorted(expected[2] + expected[3]) == list(range(0, 96, 8))


def test_tokens_of_four_bytes_are_read_as_such(tmp_path: Path) -> None:
    large = [70_000 + n for n in range(17)]
    training, _ = load(write(tmp_path, large, dtype="uint32"), vocabulary=100_000)
    assert training.select(torch.tensor([1])).inputs[0].tolist() == large[8:16]


def test_a_token_outside_the_vocabulary_is_named_with_its_position(tmp_path: Path) -> None:
    training, _ = load(write(tmp_path, [*range(20), 300, *range(20)]))
    training.select(torch.tensor([0, 1]))
    with pytest.raises(InputError) as error:
        training.select(torch.tensor([0, 2]))
    assert str(error.value) == (
        f"{tmp_path / 'train.bin'}: token 300 at byte 40 is not allowed: must be below 256, the model's vocabulary"
    )


def test_damaged_token_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"data_path: .*absent' is not allowed: must be a folder with train.bin"):
        load(tmp_path / "absent")
    path = write(tmp_path, list(range(50))) / "train.bin"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(InputError, match=r"train.bin: 99 bytes are not allowed: must be a multiple of 2, for uint16"):
        load(tmp_path)
    write(tmp_path, list(range(50)), vocabulary=256, training_tokens=51)
    with pytest.raises(InputError, match=r"train.bin: holds 50 tokens, must hold 51 as meta.json says"):
        load(tmp_path)
    write(tmp_path, list(range(50)), vocabulary=257)
    with pytest.raises(InputError, match=r"vocabulary: 256 is not allowed: must be at least 257, as .*meta.json says"):
        load(tmp_path)
    (tmp_path / "meta.json").write_text('{"dtype": "int8"}')
    with pytest.raises(InputError, match=r"meta.json: dtype: 'int8' is not allowed"):
        load(tmp_path)
    (tmp_path / "meta.json").unlink()
    with pytest.raises(InputError, match=r"val.bin: 9 tokens are not allowed: must be more than 9, the context"):
        load(tmp_path, context=9)
    (tmp_path / "val.bin").write_bytes(b"")
    with pytest.raises(InputError, match=r"val.bin: 0 tokens are not allowed"):
        load(tmp_path)
    (tmp_path / "val.bin").unlink()
    with pytest.raises(InputError, match=r"val.bin: cannot be read: No such file"):
        load(tmp_path)


def test_preflight_checks_the_data(tmp_path: Path) -> None:
    data = write(tmp_path / "data", list(range(97)))
    folder = write_plan(tmp_path / "plan", 1, model=MODEL, data="tokens", data_path=str(data), micro_batch=8)
    found = {check.name: check for check in check_node(load_plan(folder), folder)}["data"]
    assert found.passed
    assert found.text == "12 samples to train on, 1 held out"
    (data / "val.bin").unlink()
    found = {check.name: check for check in check_node(load_plan(folder), folder)}["data"]
    assert not found.passed
    assert found.text.endswith("val.bin: cannot be read: No such file or directory")
    write(data, list(range(40)))
    found = {check.name: check for check in check_node(load_plan(folder), folder)}["data"]
    assert not found.passed
    assert found.text.startswith("4 samples to train on: a step takes 8")


def test_every_tenth_file_of_the_standard_library_is_held_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(20):
        (tmp_path / f"m{number:02d}.py").write_bytes(bytes([97 + number]) * 20)
    for other in ("site-packages", "test"):
        (tmp_path / other).mkdir()
        (tmp_path / other / "x.py").write_text("never read")
    (tmp_path / "data.txt").write_text("nor this")
    training, held_out = load_stdlib(parse_model_spec(MODEL), tmp_path)
    assert training.tokens.tobytes() == b"".join(bytes([97 + n]) * 20 for n in range(20) if n not in (9, 19))
    assert held_out.tokens.tobytes() == b"j" * 20 + b"t" * 20
    assert "data: stdlib of Python " in (printed := capsys.readouterr().err)
    assert printed.endswith("20 files, 400 bytes\n")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"stdlib in .*empty: 0 tokens are not allowed"):
        load_stdlib(parse_model_spec(MODEL), tmp_path / "empty")


def test_the_standard_library_of_this_python_is_enough_to_train_on() -> None:
    training, held_out = load_samples(parse_model_spec(MODEL | {"context": 1024}), TrainingSpec(data="stdlib"))
    assert len(training) > 2000
    assert len(held_out) > 200
    batch = training.select(torch.arange(8))
    text = bytes(batch.inputs.flatten().tolist())
    first = next(stdlib_files(Path(json.__file__).parent.parent))
    assert first.read_bytes()[:200] == text[:200]
    assert resident_bytes(training) == 0


def resident_bytes(source: DataSource) -> int:
    return sum(tensor.untyped_storage().nbytes() for tensor in source.resident)


def random_windows(tokens: int, **fields: int) -> TokenWindows:
    return TokenWindows(np.arange(tokens, dtype=np.uint16), 8, 256, "text", RandomWindows(**fields))


def test_random_windows_start_anywhere_and_change_from_epoch_to_epoch() -> None:
    source = random_windows(40, seed=3, epoch_samples=500)
    assert len(source) == 500
    first, second = (source.select(torch.arange(500), epoch) for epoch in (0, 1))
    starts = first.inputs[:, 0]
    # Every start is drawn whose window and last target lie within the 40 tokens.
    assert sorted(set(starts.tolist())) == list(range(32))
    assert torch.equal(first.inputs, starts[:, None] + torch.arange(8))
    assert torch.equal(first.targets, first.inputs + 1)
    assert (first.inputs[:, 0] == second.inputs[:, 0]).float().mean() < 0.1
    again = random_windows(40, seed=3, epoch_samples=500).select(torch.tensor([7, 499]), 1)
    assert torch.equal(again.inputs, second.inputs[[7, 499]])
    other = random_windows(40, seed=4, epoch_samples=500).select(torch.arange(500))
    assert not torch.equal(other.inputs, first.inputs)


def test_a_bad_token_of_a_random_window_is_found(tmp_path: Path) -> None:
    source = TokenWindows(np.full(40, 300, dtype=np.uint16), 8, 256, "text", RandomWindows(seed=0))
    assert len(source) == 4
    with pytest.raises(InputError, match=r"text: token 300 at byte \d+ is not allowed: must be below 256"):
        source.select(torch.tensor([2]))


def test_a_plan_trains_on_random_windows_and_evaluates_consecutive_ones(tmp_path: Path) -> None:
    folder = write(tmp_path, list(range(200)))
    values = {"data": "tokens", "data_path": str(folder), "token_windows": "random", "epoch_steps": 5}
    training, held_out = load_samples(parse_model_spec(MODEL), TrainingSpec.model_validate(values), 6)
    assert (len(training), len(held_out)) == (30, 1)
    assert held_out.select(torch.tensor([0])).inputs.tolist() == [list(range(8))]
    with pytest.raises(
        ValueError, match="token_windows: 'random' is not allowed: must be consecutive with data digits"
    ):
        TrainingSpec(token_windows="random")


def test_a_fingerprint_tells_whether_a_text_was_exchanged(tmp_path: Path) -> None:
    tokens = np.arange(50_000) % 200
    first = TokenWindows(tokens.astype(np.uint16), 8, 256, "text").fingerprint()
    assert TokenWindows(tokens.astype(np.uint32), 8, 256, "other name").fingerprint() == first
    assert TokenWindows(tokens[:-1].astype(np.uint16), 8, 256, "text").fingerprint() != first
    changed = tokens.copy()
    changed[25_000] += 1
    assert TokenWindows(changed.astype(np.uint16), 8, 256, "text").fingerprint() != first
