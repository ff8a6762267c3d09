"""`translution estimate`: the table and the JSON document."""

from __future__ import annotations

import json

import pytest

from translution.cli.main import run
from translution.planner.config.model_base import OPERATORS

Captured = pytest.CaptureFixture[str]


def test_json_has_exact_counts(capsys: Captured) -> None:
    assert run(["estimate", "vit-base/16", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["parameters"]["total"] == 15_608_200_168
    by_operator = {entry["operator"]: entry["parameters"]["total"] for entry in document["comparison"]}
    # Attention has 197·768 positions; instead of them a scalar has 732·12·12 entries, two vectors
    # have 2·732·64·12, and absolute matrices are 197 times 12·3·768² parameters.
    assert by_operator == {
        "translution": 15_608_200_168,
        "alpha": 1_064_909_800,
        "attention": 86_543_080,
        "bias": 86_497_192,
        "shaw": 87_516_136,
        "absolute": 4_248_189_928,
    }
    assert [stage["stage"] for stage in document["per_rank"]["zero"]] == [0, 1, 2, 3]
    assert isinstance(document["activations_bytes"]["published"], int)


def test_flags_override_model_fields(capsys: Captured) -> None:
    arguments = ["--operator", "alpha", "--roles", "kv", "--c1", "16", "--c2", "16", "--json"]
    assert run(["estimate", "gpt-tiny/160", *arguments]) == 0
    assert json.loads(capsys.readouterr().out)["parameters"]["total"] == 26_610_048
    assert run(["estimate", "vit-tiny/56", "--relative-layers", "first:2", "--set", "depth=4", "--json"]) == 0
    model = json.loads(capsys.readouterr().out)["model"]
    assert (model["depth"], model["relative_layers"]) == (4, "first:2")


def test_the_table_compares_the_operators(capsys: Captured) -> None:
    assert run(["estimate", "vit-base/16"]) == 0
    out = capsys.readouterr().out
    for text in ("full Translution", "α-Translution", "attention", "15.61 G", "15,608,200,168", "ZeRO-3"):
        assert text in out


def test_a_note_explains_the_papers_name_vit_b(capsys: Captured) -> None:
    assert run(["estimate", "ViT-B/16"]) == 0
    assert "paper's name for vit-mini/16; for ViT-Base write vit-base/16" in capsys.readouterr().err


@pytest.mark.parametrize("operator", ["attention", "alpha"])
def test_a_rotary_model_is_compared_with_every_operator(operator: str, capsys: Captured) -> None:
    assert run(["estimate", "vit-base/16", "--operator", operator, "--set", "rotary=true", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert {entry["operator"] for entry in document["comparison"]} == set(OPERATORS)
