"""Model specs: presets, files, overrides, and one-line errors for bad input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from translution.planner.common.errors import InputError
from translution.planner.config.loading import PRESET_NAMES, load_model, preset, save_model
from translution.planner.config.model import GptSpec, VitSpec, override, parse_model_spec

VIT: dict[str, Any] = {"family": "vit", "image": 32, "patch": 8, "classes": 10, "dim": 48, "depth": 4, "heads": 3}


@pytest.mark.parametrize("name", PRESET_NAMES)
def test_every_listed_preset_exists(name: str) -> None:
    assert preset(name).name == name


@pytest.mark.parametrize(
    ("alias", "name"),
    [
        ("ViT-A/56", "vit-tiny/56"),
        ("ViT-B/32", "vit-mini/32"),
        ("ViT-C/16", "vit-small/16"),
        ("GPT-A-160", "gpt-tiny/160"),
        ("gpt-C/256", "gpt-small/256"),
    ],
)
def test_the_papers_names_are_aliases(alias: str, name: str) -> None:
    assert preset(alias) == preset(name)


def test_sizes_follow_the_definition() -> None:
    base = preset("vit-base/16")
    assert isinstance(base, VitSpec)
    assert (base.dim, base.depth, base.heads, base.head_dim, base.ffn_dim, base.tokens) == (768, 12, 12, 64, 3072, 197)
    gpt = preset("gpt-large/1024")
    assert isinstance(gpt, GptSpec)
    assert (gpt.dim, gpt.depth, gpt.tokens, gpt.vocabulary) == (1024, 24, 1024, 50257)


@pytest.mark.parametrize("suffix", [".yaml", ".yml", ".json"])
@pytest.mark.parametrize(
    "fields",
    [{}, {"image": [32, 16], "relative_layers": [0, 3]}, {"operator": "alpha", "c1": 2, "rotary": True}],
    ids=str,
)
def test_a_saved_spec_loads_unchanged(tmp_path: Path, suffix: str, fields: dict[str, Any]) -> None:
    spec = parse_model_spec(VIT | fields)
    path = tmp_path / f"model{suffix}"
    save_model(spec, path)
    assert load_model(str(path)) == spec
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ("all", "tttt"),
        ("first:1", "taaa"),
        ("first:4", "tttt"),
        ("every:2", "tata"),
        ("every:3", "taat"),
        ([3, 1], "atat"),
    ],
)
def test_relative_layers_choose_the_operator_of_each_layer(layers: Any, expected: str) -> None:
    spec = parse_model_spec(VIT | {"relative_layers": layers})
    assert "".join(operator[0] for operator in spec.layer_operators) == expected
    assert not spec.learned_positions


def test_only_plain_attention_learns_positions() -> None:
    assert parse_model_spec(VIT | {"operator": "attention"}).learned_positions
    assert not parse_model_spec(VIT | {"operator": "attention", "rotary": True}).learned_positions
    assert not parse_model_spec(VIT | {"operator": "alpha"}).learned_positions


def test_an_override_is_validated_and_derived_widths_follow() -> None:
    spec = override(preset("vit-base/16"), dim=384, heads=6)
    assert (spec.head_dim, spec.ffn_dim) == (64, 1536)
    wide = override(parse_model_spec(VIT | {"head_dim": 20, "ffn_dim": 50}), dim=96)
    assert (wide.head_dim, wide.ffn_dim) == (20, 50)
    with pytest.raises(InputError, match="vit-base/16: heads: 7 is not allowed: must divide dim 768"):
        override(preset("vit-base/16"), heads=7)


def test_roles_take_any_order() -> None:
    assert parse_model_spec(VIT | {"roles": "vk"}).roles == "kv"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"patch": 7}, "patch: 7 is not allowed: must divide the image height 32, such as 2, 4, 8"),
        ({"patch": [8, 5]}, "patch: 5 is not allowed: must divide the image width 32"),
        ({"heads": 5}, "heads: 5 is not allowed: must divide dim 48 when head_dim is not given"),
        ({"hedas": 3}, r"unknown key 'hedas' \(did you mean 'heads'\?\); allowed: name, dim"),
        ({"c1": 0}, "c1: 0 is not allowed"),
        ({"c2": -3}, "c2: -3 is not allowed"),
        ({"dim": "wide"}, "dim: 'wide' is not allowed"),
        ({"dim": 48.0}, "dim: 48.0 is not allowed"),
        ({"depth": True}, "depth: True is not allowed"),
        ({"roles": ""}, "roles: '' is not allowed: must be one or more of q, k and v"),
        ({"roles": "qq"}, "roles: 'qq'"),
        ({"operator": "conv"}, "operator: 'conv' is not allowed"),
        ({"relative_layers": "first:9"}, "relative_layers: 'first:9' is not allowed: .* K from 1 to 4"),
        ({"relative_layers": [4]}, "relative_layers"),
        ({"relative_layers": "some"}, "relative_layers: 'some'"),
        ({"family": "cnn"}, "family: 'cnn' is not allowed: must be vit, gpt or video"),
        ({"pool": "class", "class_token": False}, "class_token: False is not allowed"),
        ({"rotary": True}, "rotary: True is not allowed: must be false for operator translution"),
        (
            {"operator": "attention", "rotary": True, "head_dim": 6},
            "head_dim: 6 is not allowed: must be a multiple of 4",
        ),
        ({"other_rotary": False}, "other_rotary: False is not allowed: must be true without other layers of attention"),
        ({"rotary_pairs": "halves"}, "rotary_pairs: 'halves' is not allowed: must be neighbours without rotary layers"),
        ({"positions": "sine"}, "positions: 'sine' is not allowed"),
        ({"token_init_std": 0}, "token_init_std: 0 is not allowed"),
        ({"other_causal": False}, "unknown key 'other_causal'"),
        ({"context": 5}, "unknown key 'context'"),
        ({"classes": None}, "classes: None"),
        ({"window": -1}, "window: -1 is not allowed"),
        ({"window": [1, True]}, r"window: \[1, True\] is not allowed: must be from 0 to 1048576, or null, or a list"),
        ({"window": [1, 1, 1]}, r"window: \(1, 1, 1\) is not allowed: must be one number, or one for each of 2 axes"),
        ({"window": 2, "operator": "attention"}, "window: 2 is not allowed: must be null for operator attention"),
    ],
    ids=str,
)
def test_the_error_for_a_bad_field_names_it_and_its_value(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        parse_model_spec(VIT | fields)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vit-bse/16", "did you mean 'vit-base/16'"),
        ("resnet", "model: 'resnet' is not allowed"),
        ("vit-base/0", "model: 'vit-base/0'"),
        ("vit-base/15", "patch: 15 is not allowed: must divide the image height 224"),
        ("nowhere.yaml", "nowhere.yaml: no such file"),
    ],
)
def test_a_bad_name_gives_a_one_line_error(name: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_model(name)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1, 2]", "holds a list"),
        ("a: [", "not valid YAML"),
        ("", "holds nothing"),
        ("family: vit\ndim: 4", "is required"),
    ],
)
def test_a_bad_file_gives_a_one_line_error(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "model.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        load_model(str(path))
    assert "\n" not in str(caught.value)


def test_a_spec_cannot_be_changed_in_place() -> None:
    with pytest.raises(ValueError, match="frozen"):
        preset("vit-base/16").dim = 5  # type: ignore[misc]  # the test assigns to a frozen field


def test_other_layers_are_not_causal_only_where_there_are_some() -> None:
    gpt = {"family": "gpt", "context": 6, "vocabulary": 11, "dim": 12, "depth": 2, "heads": 2}
    spec = parse_model_spec(gpt | {"relative_layers": "first:1", "other_causal": False})
    assert not spec.attention_causal
    assert parse_model_spec(gpt).attention_causal
    with pytest.raises(InputError, match="other_causal: False is not allowed: must be true without other layers"):
        parse_model_spec(gpt | {"other_causal": False})


@pytest.mark.parametrize("suffix", [".yaml", ".json"])
def test_a_clip_with_a_window_per_axis_survives_a_file(tmp_path: Path, suffix: str) -> None:
    clip = {
        "family": "video",
        "dim": 48,
        "depth": 2,
        "heads": 3,
        "classes": 10,
        "frames": 8,
        "image": 32,
        "causal": True,
    }
    spec = parse_model_spec(clip | {"tubelet": [2, 8, 4], "window": [None, 1, 2]})
    assert (spec.geometry.axes, spec.geometry.reach) == ((4, 4, 8), (3, 1, 2))
    assert spec.geometry.causal
    save_model(spec, tmp_path / f"clip{suffix}")
    assert load_model(tmp_path / f"clip{suffix}") == spec
    with pytest.raises(InputError, match="tubelet: 3 is not allowed: must divide the frames 8, such as 1, 2, 4"):
        override(spec, tubelet=(3, 8, 4))


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ("3", "has no 'model_spec' in its metadata"),
        ('"a model_spec"', "has no 'model_spec' in its metadata"),
        ('["model_spec"]', "has no 'model_spec' in its metadata"),
        ('{"model_spec": 3}', "model_spec: holds a number: must be keys and their values"),
        ('{"model_spec": "{"}', "model_spec: not valid JSON"),
        (json.dumps({"model_spec": 100_000 * "["}), "model_spec: not valid JSON"),
    ],
    ids=["number", "text", "list", "no text", "cut", "deep"],
)
def test_damaged_metadata_of_a_network_file_is_named(tmp_path: Path, metadata: str, message: str) -> None:
    header = f'{{"__metadata__": {metadata}}}'.encode()
    path = tmp_path / "network.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(InputError, match=message):
        load_model(path)
