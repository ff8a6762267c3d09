"""Networks of the authors' code, loaded as ours, compute what theirs do; and the way back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from translution.models import VisionTransformer, build, load_published, to_published
from translution.planner.common.errors import InputError
from translution.planner.config.model import ModelSpec, VitSpec, override, parse_model_spec

DATA = Path(__file__).parents[3] / "data" / "published"
NAMES = sorted(path.stem for path in DATA.glob("*.json"))
OLD = [
    name for name in NAMES if name.count("_") and name.split("_")[-1] in ("0845c3e", "4fb3d5c", "b0c2633", "004d32a")
]


def published(name: str) -> dict[str, Any]:
    """What the authors' network is, in words."""
    case: dict[str, Any] = json.loads((DATA / f"{name}.json").read_text())
    return case


def weights(name: str) -> Path:
    """Its state dict."""
    return DATA / f"{name}.weights.safetensors"


def told(case: dict[str, Any]) -> dict[str, Any]:
    """The fields that a state dict does not tell."""
    fields = {key: case[key] for key in ("heads", "image", "patch", "pool") if case.get(key) is not None}
    return fields | {"revision": case["revision"]}


def test_networks_of_every_kind_are_there() -> None:
    assert len(NAMES) == 19
    assert len(OLD) == 4


@pytest.mark.parametrize("name", NAMES)
def test_a_loaded_network_computes_what_the_authors_code_does(name: str) -> None:
    case, expected = published(name), load_file(DATA / f"{name}.expected.safetensors")
    spec, network = load_published(weights(name), **told(case))
    for key in ("family", "operator", "dim", "depth", "head_dim", "ffn_dim"):
        assert getattr(spec, key) == case[key], key
    inputs = expected["input"]
    single = network(inputs.float() if inputs.is_floating_point() else inputs)
    torch.testing.assert_close(single.double(), expected["logits"], rtol=0, atol=2e-6)

    network = network.double()
    logits = network(inputs)
    torch.testing.assert_close(logits, expected["logits"], rtol=0, atol=1e-10)
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, -2), expected["targets"].flatten())
    assert loss.item() == pytest.approx(case["loss"], abs=1e-10)
    loss.backward()
    if case["convention"] == "new":
        for parameter in network.parameters():
            assert parameter.grad is not None
            parameter.data = parameter.grad
        gradients = to_published(network, spec)
        for key, norm in case["grad_norm"].items():
            assert gradients[key.removeprefix("module.")].norm().item() == pytest.approx(norm, abs=1e-9), key


@pytest.mark.parametrize("name", [name for name in NAMES if name not in OLD])
def test_a_network_written_for_the_authors_code_has_their_tensors(name: str) -> None:
    case, theirs = published(name), load_file(weights(name))
    spec, network = load_published(weights(name), **told(case))
    written = to_published(network, spec)
    state = {key.removeprefix("module."): value for key, value in theirs.items()}
    if name == "vit_rope_translution":
        # Their class has caches that it does not use.
        state = {key: value for key, value in state.items() if ".rope." not in key}
    assert written.keys() == state.keys()
    for key, value in state.items():
        torch.testing.assert_close(written[key], value, rtol=0, atol=1e-7 if key.endswith("_cached") else 0)


@pytest.mark.parametrize("name", OLD)
def test_the_revision_decides_which_table_is_which(name: str) -> None:
    case, expected = published(name), load_file(DATA / f"{name}.expected.safetensors")
    _, network = load_published(weights(name), **told(case) | {"revision": "new"})
    logits = network.double()(expected["input"])
    assert (logits - expected["logits"]).abs().max() > 1e-3


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_training_checkpoint_of_a_preset_needs_no_fields(suffix: str, tmp_path: Path) -> None:
    spec = parse_model_spec({
        "family": "vit", "image": 32, "patch": 16, "classes": 7, "dim": 192, "depth": 1, "heads": 3, "roles": "qv",
        "operator": "alpha", "c1": 4, "c2": 4,
    })  # fmt: skip
    network = build(spec)
    state = {f"module.{key}": value for key, value in to_published(network, spec).items()}
    path = tmp_path / f"best{suffix}"
    if suffix == ".pth":
        torch.save({"epoch": 3, "arch": "lor_qv_tiny", "state_dict": state, "optimizer": {"state": {}}}, path)
        found, loaded = load_published(path)
        assert found == override(spec, name="lor_qv_tiny")
    else:
        save_file(state, path)
        found, loaded = load_published(path, heads=3, image=32, patch=16)
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(loaded(images), network(images))


@pytest.mark.parametrize(
    "changes",
    [
        {"pool": "mean"},
        {"relative_layers": "first:1"},
        {"relative_layers": "first:1", "operator": "alpha", "roles": "kv", "c1": 2, "c2": 2},
        {"operator": "attention", "rotary": True, "positions": "learned"},
        {"roles": "q"},
        {"image": [16, 4], "relative_layers": "first:1"},
    ],
    ids=str,
)
def test_a_network_survives_the_way_to_the_authors_code_and_back(changes: dict[str, Any], tmp_path: Path) -> None:
    base = {
        "family": "vit", "image": [8, 12], "patch": 4, "classes": 5, "dim": 16, "depth": 2, "heads": 2, "head_dim": 8,
        "ffn_dim": 24, "name": "network",
    }  # fmt: skip
    spec = parse_model_spec(base | changes)
    assert isinstance(spec, VitSpec)
    network = build(spec).eval()
    path = tmp_path / "network.safetensors"
    save_file(to_published(network, spec), path)
    found, again = load_published(path, revision="new", heads=2, image=spec.image, patch=4, pool=spec.pool)
    assert found == spec
    assert isinstance(again, VisionTransformer)
    images = torch.randn(2, 3, *spec.image)
    # Rows of rotary projections are reordered there and back.
    torch.testing.assert_close(again(images), network(images))


GPT = {
    "family": "gpt", "context": 6, "vocabulary": 11, "dim": 12, "depth": 2, "heads": 2, "name": "network",
    "relative_layers": "first:1", "other_rotary": False, "other_causal": False,
}  # fmt: skip


def test_a_gpt_with_positions_and_other_layers_survives_the_way_back(tmp_path: Path) -> None:
    spec = parse_model_spec(GPT | {"positions": "learned"})
    network = build(spec).eval()
    torch.save(to_published(network, spec), tmp_path / "network.pt")
    found, again = load_published(tmp_path / "network.pt", revision="13730aa", heads=2)
    assert found == spec
    tokens = torch.randint(11, (2, 6))
    torch.testing.assert_close(again(tokens), network(tokens))


def refused(change: Any, tmp_path: Path, **fields: Any) -> str:
    """The error of loading a changed state dict."""
    state = load_file(weights("vit_full_qkv"))
    change(state)
    save_file(state, tmp_path / "changed.safetensors")
    with pytest.raises(InputError) as error:
        load_published(
            tmp_path / "changed.safetensors", **{"revision": "new", "heads": 2, "image": 12, "patch": 4} | fields
        )
    text = str(error.value)
    assert "\n" not in text
    return text


def test_what_does_not_fit_is_named_in_one_line(tmp_path: Path) -> None:
    key = "translution.layers.1.0.to_k.unique_params"
    assert "mlp_head.bias is missing" in refused(lambda state: state.pop("mlp_head.bias"), tmp_path)
    assert "extra.weight is no tensor of this network" in refused(
        lambda state: state.update({"extra.weight": torch.zeros(1)}), tmp_path
    )
    assert "layers.1 has tables of qv: must be those of layers.0, qkv" in refused(
        lambda state: state.pop(key), tmp_path
    )
    assert "norm.weight: shape (15,) is not allowed: must be (16,)" in refused(
        lambda state: state.update({"translution.layers.0.0.norm.weight": torch.zeros(15)}), tmp_path
    )
    nothing = lambda state: None  # noqa: E731
    assert "heads: is required" in refused(nothing, tmp_path, heads=None)
    assert "heads: 3 is not allowed: must divide" in refused(nothing, tmp_path, heads=3)
    assert "patch: is required" in refused(nothing, tmp_path, patch=None)
    assert "image: is required" in refused(nothing, tmp_path, image=None)
    assert "has 18 relations, and the file 28" in refused(nothing, tmp_path, image=(8, 12))
    assert "revision: is required: the file does not tell" in refused(nothing, tmp_path, revision=None)
    assert "revision: 'abcdefg' is not allowed" in refused(nothing, tmp_path, revision="abcdefg")
    assert "dim: 17 is not allowed: the file has 16" in refused(nothing, tmp_path, dim=17)
    assert "colour" in refused(nothing, tmp_path, colour=3)


def test_what_is_no_checkpoint_is_named_in_one_line(tmp_path: Path) -> None:
    cases: dict[str, Any] = {
        "list.pt": [1], "empty.pt": {}, "numbers.pt": {"a": 1}, "other.pt": {"weight": torch.zeros(2)},
    }  # fmt: skip
    for name, value in cases.items():
        torch.save(value, tmp_path / name)
    (tmp_path / "text.pth").write_text("no checkpoint")
    (tmp_path / "text.safetensors").write_text("no checkpoint")
    texts = {
        "absent.pt": "no such file", "list.pt": "holds a list", "empty.pt": "holds no state dict",
        "numbers.pt": "a is no tensor", "other.pt": "neither cls_token nor wte.weight",
        "text.pth": "not a file that torch.save has written", "text.safetensors": "not a complete safetensors file",
    }  # fmt: skip
    for name, text in texts.items():
        with pytest.raises(InputError, match=text) as error:
            load_published(tmp_path / name)
        assert str(error.value).startswith(f"{tmp_path / name}: ")


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"norm": "rms"}, "norm: 'rms' is not allowed: must be 'layer'"),
        ({"window": 2}, "window: 2 is not allowed"),
        ({"other_rotary": True}, "other_rotary: True is not allowed: must be False"),
        ({"other_causal": True}, "other_causal: True is not allowed: must be False"),
        ({"operator": "alpha", "c1": 2, "c2": 4}, "c1: 2 is not allowed: must equal c2 4"),
        ({"operator": "bias"}, "operator: 'bias' is not allowed"),
        ({"relative_layers": [1]}, r"relative_layers: \(1,\) is not allowed: must be the first layers"),
    ],
    ids=str,
)
def test_what_the_authors_code_lacks_is_not_written(changes: dict[str, Any], text: str) -> None:
    spec: ModelSpec = parse_model_spec(GPT | changes)
    with pytest.raises(InputError, match=text):
        to_published(build(spec), spec)


def test_a_clip_has_no_network_in_the_authors_code() -> None:
    clip = {
        "family": "video",
        "frames": 2,
        "image": 4,
        "tubelet": [1, 2, 2],
        "classes": 3,
        "dim": 8,
        "depth": 1,
        "heads": 2,
    }
    spec: ModelSpec = parse_model_spec(clip)
    with pytest.raises(InputError, match="family: 'video' is not allowed: must be 'vit' or 'gpt' in the authors' code"):
        to_published(build(spec), spec)
