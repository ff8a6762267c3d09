"""The networks: activation checkpointing only changes memory, seeds determine the weights, state dicts load."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from translution.distributed.profiling.allocation_tracer import count_every_allocation, trace_allocations
from translution.models import build
from translution.planner.common.errors import InputError
from translution.planner.config.model import ModelSpec, PatchSpec, VitSpec, parse_model_spec
from translution.planner.memory.estimate import peak_bytes, saved_bytes
from translution.planner.simulator.network.ops import DtypeSizes

VIT: dict[str, Any] = {"family": "vit", "image": [12, 8], "patch": 4, "channels": 2, "classes": 7, "dim": 24}
GPT: dict[str, Any] = {"family": "gpt", "context": 11, "vocabulary": 13, "dim": 24}
SIZES: dict[str, Any] = {"depth": 3, "heads": 2, "head_dim": 8}
OPERATORS: list[dict[str, Any]] = [
    {"operator": "translution"},
    {"operator": "translution", "roles": "kv", "relative_layers": "every:2"},
    {"operator": "alpha", "c1": 3, "c2": 5, "rotary": True},
    {"operator": "attention"},
    {"operator": "bias"},
    {"operator": "shaw", "relative_layers": "first:1"},
    {"operator": "absolute", "roles": "kv"},
    {"operator": "alpha", "c1": 3, "c2": 5, "dropout": 0.25},
    {"operator": "shaw", "dropout": 0.1},
]


def samples(spec: ModelSpec, batch: int) -> Tensor:
    torch.manual_seed(1)
    if isinstance(spec, VitSpec):
        return torch.randn(batch, spec.channels, *spec.image)
    return torch.randint(spec.vocabulary, (batch, spec.context))


def network_of(spec: ModelSpec) -> nn.Module:
    torch.manual_seed(0)
    return build(spec, tile_relations=4)


@pytest.mark.filterwarnings("ignore:.*None of the inputs have requires_grad")
@pytest.mark.parametrize("operator", OPERATORS, ids=str)
@pytest.mark.parametrize("family", [VIT, GPT], ids=["vit", "gpt"])
@pytest.mark.parametrize("checkpointing", ["block", "offload"])
def test_checkpointing_changes_neither_output_nor_gradients(
    family: dict[str, Any], operator: dict[str, Any], checkpointing: str
) -> None:
    results = []
    for kind in ("none", checkpointing):
        spec = parse_model_spec(family | SIZES | operator | {"checkpointing": kind})
        network, inputs = network_of(spec), samples(spec, 2)
        torch.manual_seed(2)  # Dropout is the same in both networks.
        out = network(inputs)
        out.square().sum().backward()
        results.append({"out": out, **{name: parameter.grad for name, parameter in network.named_parameters()}})
        if not spec.dropout:
            network.eval()
            with torch.no_grad():
                torch.testing.assert_close(network(inputs), out)
    assert results[0].keys() == results[1].keys()
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("checkpointing", ["none", "block"])
@pytest.mark.parametrize("operator", ["translution", "alpha", "attention"])
def test_the_peak_of_a_step_is_predicted_and_checkpointing_lowers_it(operator: str, checkpointing: str) -> None:
    base: dict[str, Any] = {"family": "vit", "image": 20, "patch": 4, "classes": 10, "dim": 32, "depth": 6, "heads": 4}
    base |= {"c1": 4, "c2": 4}
    spec = parse_model_spec(base | {"operator": operator, "checkpointing": checkpointing})
    network, inputs, targets = network_of(spec), samples(spec, 16), torch.zeros(16, dtype=torch.int64)
    count_every_allocation()

    def step() -> None:
        nn.functional.cross_entropy(network(inputs), targets).backward()

    step()  # Allocates the gradients.
    begin, peak = trace_allocations(step)
    predicted = peak_bytes(spec, 16, DtypeSizes.of(4, "cpu"))
    largest_gradient = max(parameter.numel() for parameter in network.parameters()) * 4
    # A new gradient exists together with the one it is added to.
    assert peak - begin <= predicted + 2 * largest_gradient
    assert predicted <= 1.35 * (peak - begin)
    if checkpointing == "block":
        plain = parse_model_spec(base | {"operator": operator})
        assert predicted < peak_bytes(plain, 16, DtypeSizes.of(4, "cpu")) / 2


def test_offloaded_checkpoints_are_not_on_the_device() -> None:
    spec = parse_model_spec(VIT | SIZES | {"checkpointing": "offload"})
    block = parse_model_spec(VIT | SIZES | {"checkpointing": "block"})
    stream = 2 * 7 * 24 * 4
    gpu = DtypeSizes.of(4, "cuda")
    assert saved_bytes(block, 2, gpu) - saved_bytes(spec, 2, gpu) == 3 * stream
    assert saved_bytes(spec, 2, DtypeSizes.of(4, "cpu")) == saved_bytes(block, 2, DtypeSizes.of(4, "cpu"))


@pytest.mark.parametrize("operator", OPERATORS, ids=str)
def test_the_same_seed_gives_the_same_network_and_its_state_dict_loads(operator: dict[str, Any]) -> None:
    spec = parse_model_spec(VIT | SIZES | operator)
    first, second = network_of(spec).eval(), network_of(spec).eval()
    inputs = samples(spec, 2)
    assert torch.equal(first(inputs), second(inputs))
    torch.manual_seed(5)
    other = build(spec, tile_relations=4).eval()
    assert not torch.equal(other(inputs), first(inputs))
    other.load_state_dict(first.state_dict())
    assert torch.equal(other(inputs), first(inputs))


def test_an_error_names_a_wrong_input() -> None:
    vit, gpt = (network_of(parse_model_spec(family | SIZES)) for family in (VIT, GPT))
    with pytest.raises(InputError, match=r"image: shape \(1, 2, 8, 8\) is not allowed"):
        vit(torch.zeros(1, 2, 8, 8))
    with pytest.raises(InputError, match=r"tokens: shape \(1, 5\) is not allowed: must be \(batch, 11\)"):
        gpt(torch.zeros(1, 5, dtype=torch.int64))


@pytest.mark.parametrize("family", ["vit", "video"])
def test_patches_are_those_of_a_convolution(family: str) -> None:
    """Without its norms, the embedding is a convolution whose kernel and stride are a patch."""
    fields = VIT | SIZES | {"patch": [4, 2]}
    if family == "video":
        del fields["patch"]
        fields |= {"family": "video", "frames": 6, "tubelet": [2, 4, 2]}
    spec = parse_model_spec(fields)
    assert isinstance(spec, PatchSpec)
    torch.manual_seed(0)
    embedding = build(spec).embedding
    embedding.patch_norm = embedding.norm = nn.Identity()
    x = torch.randn(2, *spec.sample_shape)
    # The values of a patch are ordered with the channel last.
    weight = embedding.projection.weight.unflatten(1, (*spec.patch_extents, spec.channels)).movedim(-1, 1)
    convolve = nn.functional.conv2d if family == "vit" else nn.functional.conv3d
    expected = convolve(x, weight, embedding.projection.bias, stride=spec.patch_extents)
    torch.testing.assert_close(embedding(x), expected.flatten(2).transpose(1, 2), rtol=0, atol=1e-5)
