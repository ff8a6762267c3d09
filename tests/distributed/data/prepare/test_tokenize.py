"""Token files that `prepare` writes from texts and from documents."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch

from translution.cli.main import run
from translution.distributed.data.loaders import load_samples
from translution.distributed.data.prepare import tokenize
from translution.planner.config.model import parse_model_spec
from translution.planner.config.training import TrainingSpec

MODEL = {"family": "gpt", "context": 8, "vocabulary": 256, "dim": 8, "depth": 1, "heads": 1}


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
    windows, _ = load_samples(parse_model_spec(MODEL), TrainingSpec(data="tokens", data_path=str(tmp_path / "out")))
    assert bytes(windows.select(torch.tensor([1])).inputs[0].tolist()) == raw[8:16]


def make_tokenizer(path: Path, extra: int = 0, *, end: bool = False) -> tokenizers.Tokenizer:
    """Train a byte-level BPE tokenizer on the text and add `extra` words to it, and a token for the end of a text."""
    tokenizer = tokenizers.ByteLevelBPETokenizer()
    tokenizer.train_from_iterator([LINES], vocab_size=300, show_progress=False)
    tokenizer.add_tokens([f"extra{number}" for number in range(extra)])
    if end:
        tokenizer.add_special_tokens([tokenize.END_OF_TEXT])
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
    spec = parse_model_spec(MODEL | {"vocabulary": 100_000})
    windows, _ = load_samples(spec, TrainingSpec(data="tokens", data_path=str(out)))
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

    def interrupted(_: object, chunk: bytes, name: str, start: int) -> bytes:
        written.extend(path for path in text.parent.glob(".out.*/train.bin") if path.stat().st_size)
        if start:
            raise KeyboardInterrupt
        return chunk * 10_000

    with monkeypatch.context() as patch:
        patch.setattr(tokenize, "CHUNK_BYTES", 1000)
        patch.setattr(tokenize.Encoder, "encode", interrupted)
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


DOCUMENTS = [f"Document {number} of some, with 漢字.\nIts second line" for number in range(60)]
DOCUMENTS[5] = "It speaks of <|endoftext|> itself."
DOCUMENTS[9] = ""


def write_documents(folder: Path) -> dict[str, Path]:
    """Write the documents in every format; return the paths by format."""
    import datasets

    rows = [json.dumps({"url": "x", "text": text}) + "\n" for text in DOCUMENTS]
    paths = {"lines": folder / "pages.jsonl", "table": folder / "pages.parquet", "dataset": folder / "pages"}
    # Empty lines are no documents.
    paths["lines"].write_text("\n".join(rows) + "\n")
    data = datasets.Dataset.from_dict({"text": DOCUMENTS, "url": ["x"] * len(DOCUMENTS)})
    data.to_parquet(str(paths["table"]))
    data.save_to_disk(str(paths["dataset"]))
    return paths


def test_documents_of_every_format_are_separated_and_some_held_out(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tokenize, "_DOCUMENTS", 7)
    tokenizer = make_tokenizer(tmp_path / "tokenizer.json", end=True)
    end = tokenizer.token_to_id("<|endoftext|>")
    found: dict[str, list[list[str]]] = {}
    for name, path in write_documents(tmp_path).items():
        out = tmp_path / f"out-{name}"
        flags = ["--tokenizer", str(tmp_path / "tokenizer.json"), "--held-out", "0.25", "--out", str(out)]
        assert run(["prepare", str(path), *flags]) == 0
        found[name] = []
        for file in ("train.bin", "val.bin"):
            numbers = np.array(tokens(out, file))
            assert numbers[-1] == end
            parts = np.split(numbers, np.flatnonzero(numbers == end) + 1)[:-1]
            found[name].append([tokenizer.decode(part[:-1].tolist(), skip_special_tokens=False) for part in parts])
    training, held_out = found["lines"]
    # The order stays, every document is in one part, and about a quarter is held out.
    assert [text for text in DOCUMENTS if text in training] == training
    assert [text for text in DOCUMENTS if text in held_out] == held_out
    assert len(training) + len(held_out) == len(DOCUMENTS)
    assert 8 <= len(held_out) <= 22
    assert found["table"] == found["dataset"] == found["lines"]
    assert "tokens to train on" in capsys.readouterr().out


def test_documents_without_a_tokenizer_end_with_a_line_end(tmp_path: Path) -> None:
    path = write_documents(tmp_path)["lines"]
    assert run(["prepare", str(path), "--out", str(tmp_path / "out")]) == 0
    both = (bytes(tokens(tmp_path / "out", name)).decode() for name in ("train.bin", "val.bin"))
    assert sorted("".join(both).splitlines()) == sorted(
        line for text in DOCUMENTS for line in (text + "\n").splitlines()
    )


def test_a_data_set_with_a_held_out_part_keeps_it(tmp_path: Path) -> None:
    import datasets

    parts = {"train": DOCUMENTS[:20], "validation": DOCUMENTS[20:]}
    made = datasets.DatasetDict({name: datasets.Dataset.from_dict({"text": rows}) for name, rows in parts.items()})
    made.save_to_disk(str(tmp_path / "pages"))
    assert run(["prepare", str(tmp_path / "pages"), "--out", str(tmp_path / "out")]) == 0
    assert bytes(tokens(tmp_path / "out", "val.bin")).decode() == "".join(f"{text}\n" for text in DOCUMENTS[20:])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"text"\n', "a.jsonl: line 2: not valid JSON"),
        (
            "a.jsonl",
            b'{"body": "a"}\n',
            'a.jsonl: line 1: must be an object with the text of a document: {"text": "..."}',
        ),
        ("a.jsonl", b'{"text": 3}\n', "a.jsonl: line 1: must be an object with the text"),
        ("a.jsonl", b"[]\n", "a.jsonl: line 1: must be an object with the text"),
        ("a.jsonl.gz", b"\x1f\x8b\x08\x00", "a.jsonl.gz: ends too early: the file is cut"),
        ("a.jsonl.gz", b"no gzip", "a.jsonl.gz: cannot be read: "),
        ("a.parquet", b"no table", "a.parquet: cannot be read as Parquet: "),
    ],
)
def test_bad_documents_are_named_in_one_line(
    name: str,
    content: bytes,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_bytes(content)
    assert run(["prepare", name, "--out", "out"]) == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert printed.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_table_without_texts_and_a_tokenizer_without_an_end_are_errors(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import datasets

    datasets.Dataset.from_dict({"body": ["a"]}).to_parquet(str(tmp_path / "a.parquet"))
    assert run(["prepare", str(tmp_path / "a.parquet"), "--out", str(tmp_path / "out")]) == 2
    assert "a.parquet: columns body: must include text" in capsys.readouterr().err
    datasets.Dataset.from_dict({"text": ["a", None]}).to_parquet(str(tmp_path / "b.parquet"))
    assert run(["prepare", str(tmp_path / "b.parquet"), "--out", str(tmp_path / "out")]) == 2
    assert "b.parquet: column text: 'None' is not allowed: must be a text" in capsys.readouterr().err
    make_tokenizer(tmp_path / "tokenizer.json")
    lines = tmp_path / "a.jsonl"
    lines.write_text('{"text": "a"}\n')
    assert (
        run(["prepare", str(lines), "--tokenizer", str(tmp_path / "tokenizer.json"), "--out", str(tmp_path / "out")])
        == 2
    )
    assert "has no token <|endoftext|>, which separates documents" in capsys.readouterr().err
