"""Windows of tokens from files and from the standard library, and the token files that `prepare` writes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
from helpers.runs import write_plan

from translution.cli.main import run
from translution.distributed.data import tokenize
from translution.distributed.data.base import DataSource
from translution.distributed.data.batching import micro_batches
from translution.distributed.data.loaders import load_samples
from translution.distributed.data.tokens import load_stdlib, stdlib_files
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


LINES = "".join(f"line {number} of a text with ümläuts and 漢字\n" for number in range(300))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(LINES, encoding="utf-8")
    return path


def tokens(folder: Path, name: str, dtype: str = "uint16") -> list[int]:
    return np.fromfile(folder / name, dtype=dtype).tolist()


@pytest.mark.parametrize("chunk", [7, 100, 2**20])
def test_bytes_are_written_and_read_back(
    text: Path, tmp_path: Path, chunk: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tokenize, "CHUNK_BYTES", chunk)
    other = tmp_path / "other.txt"
    other.write_bytes(b"no line\xff" * 50)
    assert run(["prepare", str(text), str(other), "--out", str(tmp_path / "out"), "--held-out", "0.2", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    training, held_out = (bytes(tokens(tmp_path / "out", name)) for name in ("train.bin", "val.bin"))
    raw = LINES.encode()
    split = raw.index(b"\n", round(0.8 * len(raw)) - 1) + 1
    assert training == raw[:split] + other.read_bytes()[:320]
    assert held_out == raw[split:] + other.read_bytes()[320:]
    assert document == {
        "folder": str(tmp_path / "out"),
        "dtype": "uint16",
        "vocabulary": 256,
        "tokenizer": None,
        "training_tokens": len(training),
        "held_out_tokens": len(held_out),
    }
    windows, _ = load(tmp_path / "out")
    assert bytes(windows.select(torch.tensor([1])).inputs[0].tolist()) == raw[8:16]


def make_tokenizer(path: Path, extra: int = 0) -> tokenizers.Tokenizer:
    """Train a byte-level BPE tokenizer on the text and add `extra` words to it."""
    tokenizer = tokenizers.ByteLevelBPETokenizer()
    tokenizer.train_from_iterator([LINES], vocab_size=300, show_progress=False)
    tokenizer.add_tokens([f"extra{number}" for number in range(extra)])
    tokenizer.save(str(path))
    return tokenizers.Tokenizer.from_file(str(path))


@pytest.mark.parametrize(("extra", "dtype"), [(0, "uint16"), (70_000, "uint32")])
def test_tokens_decode_to_the_text(
    text: Path,
    tmp_path: Path,
    extra: int,
    dtype: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(tokenize, "CHUNK_BYTES", 1000)
    tokenizer = make_tokenizer(tmp_path / "tokenizer.json", extra)
    out = tmp_path / "out"
    flags = ["--tokenizer", str(tmp_path / "tokenizer.json"), "--out", str(out)]
    assert run(["prepare", str(text), *flags]) == 0
    assert "tokens to train on" in capsys.readouterr().out
    training, held_out = tokens(out, "train.bin", dtype), tokens(out, "val.bin", dtype)
    assert tokenizer.decode(training) + tokenizer.decode(held_out) == LINES
    assert len(training) < len(LINES)
    meta = json.loads((out / "meta.json").read_text())
    assert (meta["dtype"], meta["vocabulary"]) == (dtype, tokenizer.get_vocab_size())
    windows, _ = load(out, vocabulary=100_000)
    assert windows.select(torch.tensor([2])).inputs[0].tolist() == training[16:24]


@pytest.mark.parametrize(
    ("texts", "flags", "message"),
    [
        (["absent.txt"], [], "absent.txt: no such file"),
        (["."], [], ": is no plain file"),
        (["text.txt"], ["--held-out", "1"], "held-out: 1.0 is not allowed: must be above 0 and below 1"),
        (["text.txt", "latin.txt"], ["--tokenizer", "tokenizer.json"], "latin.txt: byte 4 is not UTF-8"),
        (["text.txt"], ["--tokenizer", "absent.json"], "absent.json' cannot be read: No such file"),
        (["text.txt"], ["--tokenizer", "text.txt"], "text.txt' is not allowed: must be a tokenizer.json: "),
        (["empty.txt"], [], "texts: 0 tokens to train on and 0 held out are not allowed"),
    ],
)
def test_prepare_reports_bad_input_in_one_line_and_leaves_no_files(
    text: Path,
    texts: list[str],
    flags: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(text.parent)
    (text.parent / "latin.txt").write_bytes(b"caf\n\xe9 au lait\n" * 9)
    (text.parent / "empty.txt").touch()
    make_tokenizer(text.parent / "tokenizer.json")
    before = sorted(text.parent.iterdir())
    assert run(["prepare", *texts, *flags, "--out", "out"]) == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert printed.count("\n") == 1
    assert sorted(text.parent.iterdir()) == before


def test_an_interrupted_prepare_leaves_existing_files(
    text: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(text.parent)
    written = []

    def interrupted(chunk: bytes, name: str, start: int) -> bytes:
        written.extend(path for path in text.parent.glob(".out.*/train.bin") if path.stat().st_size)
        if start:
            raise KeyboardInterrupt
        return chunk * 10_000

    with monkeypatch.context() as patch:
        patch.setattr(tokenize, "CHUNK_BYTES", 1000)
        patch.setattr(tokenize, "_encode_bytes", interrupted)
        assert run(["prepare", "text.txt", "--out", "out"]) == 130
    assert written
    assert list(text.parent.iterdir()) == [text]
    assert run(["prepare", "text.txt", "--out", "out"]) == 0
    written_once = (text.parent / "out" / "train.bin").read_bytes()
    capsys.readouterr()
    assert run(["prepare", "text.txt", "--out", "out"]) == 2
    assert "exists already" in capsys.readouterr().err
    assert run(["prepare", "text.txt", "text.txt", "--out", "out", "--force"]) == 0
    assert len((text.parent / "out" / "train.bin").read_bytes()) == 2 * len(written_once)
