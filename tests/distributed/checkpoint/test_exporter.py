"""Exporting a checkpoint to one file: its content, the memory that it takes, and loading it."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.checkpoint_files import KINDS, write_checkpoint
from helpers.runs import TINY, write_plan
from safetensors.torch import load_file, save_file
from torch import Tensor

from translution.cli.main import run as run_cli
from translution.distributed.checkpoint.exporter import ExportedFile, export, safetensors_header
from translution.models import build, load_network
from translution.planner.common.errors import InputError
from translution.planner.config.model import parse_model_spec

TILE = 20
ALPHA: dict[str, Any] = TINY | {"operator": "alpha", "rotary": True, "c1": 2, "c2": 3}


def trained(folder: Path, model: dict[str, Any] = TINY, *, ranks: int = 2) -> tuple[Path, torch.nn.Module]:
    """A run folder with a checkpoint of a tiled network, and the network."""
    network = build(parse_model_spec(model), tile_relations=TILE).eval()
    values = {name: value.detach() for name, value in network.named_parameters()}
    tensors = dict.fromkeys(KINDS, values)
    write_plan(folder, 2, tile=TILE, model=model, data="synthetic")
    return write_checkpoint(folder, tensors, [list(values)], ranks), network


def samples() -> Tensor:
    return torch.randn(3, 1, 16, 16)


@pytest.mark.parametrize("model", [TINY, ALPHA, TINY | {"checkpointing": "offload"}], ids=["full", "alpha", "offload"])
def test_an_exported_network_computes_what_the_trained_one_does(tmp_path: Path, model: dict[str, Any]) -> None:
    run, network = trained(tmp_path / "plan", model)
    made = export(run, tmp_path / "model.safetensors")
    loaded = load_network(made.out)
    assert not loaded.training
    untiled = build(parse_model_spec(model))
    shapes = {name: tuple(value.shape) for name, value in untiled.state_dict().items()}
    assert {name: tuple(value.shape) for name, value in loaded.state_dict().items()} == shapes
    parameters, size = sum(value.numel() for value in untiled.parameters()), made.out.stat().st_size
    assert made == ExportedFile(
        out=made.out, run=run, step=7, dtype="fp32", tensors=len(shapes), parameters=parameters, file_bytes=size
    )
    images = samples()
    with torch.no_grad():
        # Tiles are summed one after another, so the rounding differs.
        torch.testing.assert_close(loaded(images), network(images), rtol=1e-5, atol=1e-6)


def test_a_tied_head_is_exported_once_and_loaded_tied(tmp_path: Path) -> None:
    sizes = {"context": 24, "vocabulary": 32, "dim": 16, "depth": 1, "heads": 2}
    model = {"family": "gpt", "tied_embeddings": True} | sizes
    run, network = trained(tmp_path / "plan", model)
    out = tmp_path / "model.safetensors"
    export(run, out)
    assert "head.weight" not in load_file(out)
    tokens = torch.arange(24)[None]
    with torch.no_grad():
        torch.testing.assert_close(load_network(out)(tokens), network(tokens), rtol=1e-5, atol=1e-6)


def test_safetensors_reads_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, network = trained(tmp_path / "plan", ranks=3)
    out = tmp_path / "model.safetensors"
    command = ["export", str(run), "--out", str(out)]
    assert run_cli(command) == 0
    assert "parameters in fp32" in capsys.readouterr().out
    tensors = load_file(out)
    tiles = [network.get_parameter(f"blocks.0.operator.tables.value_tiles.{number}.value") for number in range(3)]
    assert torch.equal(tensors["blocks.0.operator.tables.value_tiles.0.value"], torch.cat(tiles))
    assert torch.equal(tensors["head.bias"], network.get_parameter("head.bias"))
    assert run_cli(command) == 2
    assert "exists already" in capsys.readouterr().err
    assert run_cli([*command, "--force", "--dtype", "bf16", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["step"], document["dtype"], document["file_bytes"]) == (7, "bf16", out.stat().st_size)
    rounded = load_file(out)
    assert {name: value.bfloat16().tolist() for name, value in tensors.items()} == {
        name: value.tolist() for name, value in rounded.items()
    }
    assert load_network(out)(samples().bfloat16()).dtype == torch.bfloat16


def test_the_header_gives_the_position_of_every_tensor() -> None:
    text = safetensors_header({"a": (2, 3), "b": ()}, "bf16", {"k": "v"})
    (length,) = struct.unpack("<Q", text[:8])
    assert len(text) == 8 + length
    assert length % 8 == 0
    assert json.loads(text[8:]) == {
        "__metadata__": {"k": "v"},
        "a": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 12]},
        "b": {"dtype": "BF16", "shape": [], "data_offsets": [12, 14]},
    }


MEASURE = """
import sys
from pathlib import Path
from translution.distributed.checkpoint.exporter import PIECE_ELEMENTS, export

def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))

seen = []
export(Path(sys.argv[1]), Path(sys.argv[2]), on_bytes=lambda written: seen.append((anonymous(), written)))
print(max(own for own, _ in seen) - seen[0][0], max(written for _, written in seen), sum(n for _, n in seen))
"""


@pytest.mark.slow
def test_only_one_piece_is_in_memory(tmp_path: Path) -> None:
    model = TINY | {"dim": 384, "depth": 1}
    run, network = trained(tmp_path / "plan", model)
    total = sum(4 * value.numel() for value in network.parameters())
    assert total > 90e6
    program = [sys.executable, "-c", MEASURE, str(run), str(tmp_path / "out")]
    # The tests' own setting keeps freed memory.
    environment = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    printed = subprocess.run(program, env=environment, capture_output=True, text=True, check=True).stdout
    grown, piece, written = map(int, printed.split())
    assert written == total
    # Three tables of 31 MB, of three tiles each, in pieces of 16 MiB.
    assert piece == 2**24
    assert grown < 2**25


def resaved(path: Path, change: dict[str, Tensor | None], metadata: dict[str, str] | None = None) -> None:
    """Rewrite an exported file with some tensors changed or removed."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    before = json.loads(content[8 : 8 + length])["__metadata__"]
    tensors: dict[str, Any] = {**load_file(path), **change}
    path.unlink()
    save_file({n: v for n, v in tensors.items() if v is not None}, path, before if metadata is None else metadata)


def test_a_file_that_does_not_fit_the_model_is_refused_in_one_line(tmp_path: Path) -> None:
    run, _ = trained(tmp_path / "plan")
    out = tmp_path / "model.safetensors"
    complete = export(run, out).out.read_bytes()
    cases: dict[str, tuple[dict[str, Tensor | None], dict[str, str] | None]] = {
        "tensor head.bias of the model is missing": ({"head.bias": None}, None),
        "tensor tail is not in the model": ({"tail": torch.zeros(1)}, None),
        r"head.bias: shape \(9,\) is not allowed: must be \(10,\)": ({"head.bias": torch.zeros(9)}, None),
        "has no 'model_spec' in its metadata": ({}, {"format": "pt"}),
        "model_spec: not valid JSON": ({}, {"model_spec": "{"}),
        "model_spec: dim: ": ({}, {"model_spec": json.dumps(TINY | {"dim": 0})}),
    }
    for text, (change, metadata) in cases.items():
        out.write_bytes(complete)
        resaved(out, change, metadata)
        with pytest.raises(InputError, match=text) as error:
            load_network(out)
        assert "\n" not in str(error.value)
    for content in (complete[:-1], complete[:100], b""):
        out.write_bytes(content)
        with pytest.raises(InputError, match="not a complete safetensors file: "):
            load_network(out)
    out.unlink()
    with pytest.raises(InputError, match="no such file"):
        load_network(out)


def test_an_export_that_fails_leaves_no_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, _ = trained(tmp_path / "plan")
    folder = tmp_path / "out"
    folder.mkdir()
    out = folder / "model.safetensors"
    cases = {
        "dtype: 'fp8' is not allowed: must be one of fp32, bf16": [str(run), "--out", str(out), "--dtype", "fp8"],
        "is not a run folder": [str(tmp_path), "--out", str(out)],
        "cannot be written: No such file": [str(run), "--out", str(folder / "none" / "model")],
    }
    for text, arguments in cases.items():
        assert run_cli(["export", *arguments]) == 2
        error = capsys.readouterr().err
        assert text in error
        assert error.count("\n") == 1
    file = next((run / "checkpoint").rglob("*optim_states.pt"))
    file.write_bytes(file.read_bytes()[:-1])
    assert run_cli(["export", str(run), "--out", str(out)]) == 2
    assert "the checkpoint is damaged" in capsys.readouterr().err
    assert list(folder.iterdir()) == []
