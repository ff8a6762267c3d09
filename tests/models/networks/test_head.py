"""The language model's head: its loss in chunks of tokens, and the matrix that a tied one shares."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from translution.models import LanguageModel, build, load_network
from translution.models.networks import head
from translution.models.networks.head import chunked_loss, chunked_scores
from translution.planner.config.model import parse_model_spec

GPT: dict[str, Any] = {"family": "gpt", "context": 7, "vocabulary": 23, "dim": 12, "depth": 1, "heads": 2}
CHUNKS = (23, 100, 2**24)
"""Logits of a chunk: one token, four tokens, and all."""


@pytest.fixture
def operands() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(14, 12, dtype=torch.float64, generator=generator)
    weight = torch.randn(23, 12, dtype=torch.float64, generator=generator)
    return x, weight, torch.randint(23, (14,), generator=generator)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("chunk", CHUNKS)
def test_a_loss_in_chunks_and_its_gradients_are_those_of_all_logits(
    chunk: int, smoothing: float, operands: tuple[Tensor, Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head, "LOSS_CHUNK_ELEMENTS", chunk)
    x, weight, targets = operands
    found = []
    for chunked in (True, False):
        own = x.clone().requires_grad_(), weight.clone().requires_grad_()
        if chunked:
            loss = chunked_loss(*own, targets, label_smoothing=smoothing)
        else:
            loss = torch.nn.functional.cross_entropy(own[0] @ own[1].t(), targets, label_smoothing=smoothing)
        (3 * loss).backward()
        found.append((loss, own[0].grad, own[1].grad))
    torch.testing.assert_close(found[0], found[1], rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("frozen", [0, 1])
def test_a_frozen_operand_gets_no_gradient(frozen: int, operands: tuple[Tensor, Tensor, Tensor]) -> None:
    x, weight, targets = operands
    own = [x.clone(), weight.clone()]
    own[1 - frozen].requires_grad_()
    chunked_loss(own[0], own[1], targets).backward()
    assert own[frozen].grad is None
    assert own[1 - frozen].grad is not None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_gradients_are_as_exact_as_those_of_all_logits(dtype: torch.dtype) -> None:
    """In fp16 the gradients of a mean over many tokens would vanish, if forward computed them as they are."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2048, 16, generator=generator)
    weight = torch.randn(300, 16, generator=generator)
    targets = torch.randint(300, (2048,), generator=generator)
    scale = 2.0**14 if dtype == torch.float16 else 1.0

    def gradients(dtype: torch.dtype, *, chunked: bool) -> list[Tensor]:
        own = [x.to(dtype, copy=True).requires_grad_(), weight.to(dtype, copy=True).requires_grad_()]
        if chunked:
            loss = chunked_loss(own[0], own[1], targets)
        else:
            loss = torch.nn.functional.cross_entropy((own[0] @ own[1].t()).float(), targets)
        (loss * scale).backward()
        return [tensor.grad.double() / scale for tensor in own if tensor.grad is not None]

    true = gradients(torch.float32, chunked=False)

    def errors(found: list[Tensor]) -> list[float]:
        return [float((a - b).norm() / b.norm()) for a, b in zip(found, true, strict=True)]

    whole = errors(gradients(dtype, chunked=False))
    for own, theirs in zip(errors(gradients(dtype, chunked=True)), whole, strict=True):
        assert own < 1.1 * theirs + 1e-4


def test_backward_runs_once(operands: tuple[Tensor, Tensor, Tensor]) -> None:
    x, weight, targets = operands
    loss = chunked_loss(x.requires_grad_(), weight, targets)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("chunk", CHUNKS)
def test_scores_are_each_tokens_loss_and_whether_it_is_right(
    chunk: int, operands: tuple[Tensor, Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head, "LOSS_CHUNK_ELEMENTS", chunk)
    x, weight, targets = operands
    logits = x @ weight.t()
    targets[:5] = logits[:5].argmax(-1)
    losses, right = chunked_scores(x, weight, targets)
    torch.testing.assert_close(losses, torch.nn.functional.cross_entropy(logits, targets, reduction="none"))
    assert right.tolist() == (logits.argmax(-1) == targets).double().tolist()
    assert right.sum() >= 5


@pytest.mark.parametrize("tied", [False, True])
def test_a_network_returns_its_loss_and_its_scores(tied: bool) -> None:
    torch.manual_seed(0)
    network = build(parse_model_spec(GPT | {"tied_embeddings": tied})).double()
    assert isinstance(network, LanguageModel)
    tokens, targets = torch.randint(23, (2, 2, 7))
    whole = torch.nn.functional.cross_entropy(network(tokens).flatten(0, 1), targets.flatten())
    torch.testing.assert_close(network(tokens, targets), whole)
    assert network(tokens, targets, scores=True)[0].mean() == pytest.approx(whole.item())
    with torch.no_grad():
        assert not network(tokens, targets).requires_grad


def test_a_tied_head_has_the_embeddings_matrix_and_its_gradient_is_the_sum_of_both() -> None:
    torch.manual_seed(0)
    network = build(parse_model_spec(GPT | {"tied_embeddings": True})).double()
    assert network.head.weight is network.embedding.weight
    assert [name for name, _ in network.named_parameters() if "head.weight" in name] == []
    tokens, targets = torch.randint(23, (2, 2, 7))
    network(tokens, targets).backward()
    both = network.embedding.weight.grad
    untied = build(parse_model_spec(GPT)).double()
    untied.load_state_dict(network.state_dict())
    untied(tokens, targets).backward()
    torch.testing.assert_close(both, untied.embedding.weight.grad + untied.head.weight.grad)


def test_a_tied_network_stays_tied_when_it_is_loaded(tmp_path: Any) -> None:
    from safetensors.torch import save_file

    torch.manual_seed(0)
    spec = parse_model_spec(GPT | {"tied_embeddings": True})
    network = build(spec)
    path = tmp_path / "network.safetensors"
    save_file(dict(network.named_parameters()), path, {"model_spec": spec.model_dump_json()})
    loaded = load_network(path)
    assert loaded.head.weight is loaded.embedding.weight
    tokens = torch.randint(23, (2, 7))
    assert torch.equal(loaded(tokens), network(tokens))
