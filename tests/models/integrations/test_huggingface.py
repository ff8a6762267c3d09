"""The networks as PreTrainedModels of transformers."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from translution.planner.common.errors import InputError, MissingPackageError

VIT: dict[str, Any] = {"family": "vit", "image": 8, "patch": 2, "channels": 1, "classes": 3, "dim": 16, "depth": 1}
VIT |= {"heads": 2}
GPT: dict[str, Any] = {"family": "gpt", "context": 8, "vocabulary": 20, "dim": 16, "depth": 1, "heads": 2}


@pytest.fixture
def hf() -> Any:
    """The module under test. Importing it takes seconds, and every worker of pytest-xdist imports this file."""
    from translution.models.integrations import huggingface

    return huggingface


@pytest.mark.parametrize(
    "changes", [{}, {"operator": "alpha", "c1": 4, "c2": 4, "rotary": True}, {"class_token": False, "pool": "mean"}]
)
def test_a_saved_vision_transformer_is_read_again(hf: Any, changes: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = hf.TranslutionForImageClassification(hf.TranslutionConfig(VIT | changes, tile_relations=5)).eval()
    images, labels = torch.randn(2, 1, 8, 8), torch.tensor([0, 2])
    model.save_pretrained(tmp_path)
    read = transformers.AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    assert read.config.num_labels == 3
    expected, found = model(images, labels), read(images, labels)
    assert torch.equal(found.logits, expected.logits)
    torch.testing.assert_close(found.loss, nn.functional.cross_entropy(found.logits, labels))


@pytest.mark.parametrize("tied", [False, True])
def test_a_saved_language_model_is_read_again(hf: Any, tied: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = hf.TranslutionForCausalLM(hf.TranslutionConfig(GPT | {"tied_embeddings": tied})).eval()
    model.save_pretrained(tmp_path)
    read = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert (read.network.head.weight is read.network.embedding.weight) == tied
    tokens = torch.randint(20, (2, 8))
    labels = tokens.clone()
    labels[0, 3:] = -100
    expected, found = model(tokens, labels), read(tokens, labels)
    assert torch.equal(found.logits, expected.logits)
    targets = labels[:, 1:].flatten()
    seen = targets >= 0
    torch.testing.assert_close(
        found.loss, nn.functional.cross_entropy(found.logits[:, :-1].flatten(0, 1)[seen], targets[seen])
    )
    # Later tokens change nothing, so a shorter text has the same logits.
    torch.testing.assert_close(read(tokens[:, :5]).logits, expected.logits[:, :5])
    with pytest.raises(InputError, match="input_ids: 9 tokens are not allowed: must be at most 8"):
        read(torch.zeros(1, 9, dtype=torch.int64))


def test_what_a_file_lacks_gets_values(hf: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    hf.TranslutionForImageClassification(hf.TranslutionConfig(VIT | {"depth": 1})).save_pretrained(tmp_path)
    deeper = hf.TranslutionConfig(VIT | {"depth": 2})
    read = hf.TranslutionForImageClassification.from_pretrained(tmp_path, config=deeper).eval()
    table = read.network.blocks[1].operator.tables.table("value")
    # Kaiming's bound of a matrix with 16 inputs, as in the layer.
    assert 0.9 / 16**0.5 / 16**0.5 < table.abs().max() <= (1 / 16**0.5) * 1.01
    assert torch.isfinite(read(torch.randn(1, 1, 8, 8)).logits).all()


def test_the_trainer_trains_a_language_model(hf: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = hf.TranslutionForCausalLM(hf.TranslutionConfig(GPT))
    tokens = torch.arange(8) % 4
    samples = [{"input_ids": tokens, "labels": tokens}] * 8
    before = model(tokens[None], tokens[None]).loss.item()
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=10, learning_rate=1e-2, use_cpu=True, save_strategy="no", report_to="none"
    )
    transformers.Trainer(model, arguments, train_dataset=samples).train()  # type: ignore[arg-type]
    assert model(tokens[None], tokens[None]).loss.item() < before / 2


def test_a_spec_of_the_other_family_is_refused(hf: Any) -> None:
    with pytest.raises(InputError, match="family: 'gpt' is not allowed: must be vit"):
        hf.TranslutionForImageClassification(hf.TranslutionConfig(GPT))
    with pytest.raises(InputError, match="family: 'vit' is not allowed: must be gpt"):
        hf.TranslutionForCausalLM(hf.TranslutionConfig(VIT))
    with pytest.raises(InputError, match="dim"):
        hf.TranslutionConfig(VIT | {"dim": 0})


@pytest.mark.parametrize(("module", "package"), [("huggingface", "transformers"), ("timm", "timm")])
def test_a_missing_package_is_named(module: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, f"translution.models.integrations.{module}", raising=False)
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingPackageError, match=rf"{package} is missing: pip install"):
        __import__(f"translution.models.integrations.{module}")
