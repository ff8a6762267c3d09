"""Bytes saved for backward and FLOPs at odd shapes: predictions compared with counts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from translution.models import Translution, build
from translution.planner.config.loading import preset
from translution.planner.config.model import ModelSpec, PatchSpec, parse_model_spec
from translution.planner.costs.workload import count_flops
from translution.planner.memory.estimate import saved_bytes
from translution.planner.simulator.network.ops import DtypeSizes
from translution.planner.simulator.network.relation_shape import Implementation

pytestmark = pytest.mark.usefixtures("one_thread")

VIT = {"family": "vit", "image": [12, 8], "patch": 4, "channels": 2, "classes": 7, "dim": 24, "depth": 2, "ffn_dim": 40}
VIDEO = VIT | {"family": "video", "frames": 4, "tubelet": [2, 4, 4]}
del VIDEO["patch"]
GPT = {"family": "gpt", "context": 11, "vocabulary": 13, "dim": 24, "depth": 2, "ffn_dim": 40}
BASES: dict[str, dict[str, Any]] = {
    "vit": VIT,
    "mean": VIT | {"pool": "mean"},
    "no-class": VIT | {"pool": "mean", "class_token": False},
    "one-head": VIT | {"heads": 1, "head_dim": 24},
    "gpt": GPT,
    "causal-class": VIDEO | {"causal": True},
    "causal": VIDEO | {"causal": True, "pool": "mean", "class_token": False},
}
WHOLE = ("vit", "one-head", "gpt")
"""Bases that are tried with every operator; one has a single head, whose rows need no copies."""
OTHERS = ("mean", "no-class", "causal-class", "causal")
ROLES = ("qkv", "kv", "qv", "qk", "q", "k", "v")
OPERATORS: list[dict[str, Any]] = [
    {"operator": "attention"},
    {"operator": "attention", "rotary": True},
    *({"operator": "translution", "roles": roles} for roles in ROLES),
    *({"operator": "alpha", "roles": roles, "c1": 3, "c2": 5} for roles in ROLES),
    {"operator": "translution", "relative_layers": "first:1"},
    {"operator": "translution", "window": 1},
    {"operator": "bias"},
    {"operator": "shaw"},
    *({"operator": "absolute", "roles": roles} for roles in ("qkv", "kv", "q")),
    {"operator": "bias", "window": 1},
    {"operator": "shaw", "window": 2, "relative_layers": "every:2"},
    {"operator": "translution", "dropout": 0.2},
    {"operator": "alpha", "c1": 3, "c2": 5, "rotary": True, "dropout": 0.2},
    {"operator": "absolute", "roles": "kv", "relative_layers": "first:1", "dropout": 0.2},
    {"operator": "attention", "kv_heads": 1, "norm": "rms", "ffn": "swiglu", "bias": False},
    {"operator": "alpha", "c1": 3, "c2": 5, "norm": "rms", "ffn": "swiglu", "dropout": 0.2},
]
KINDS = [
    operator for operator in OPERATORS if operator.get("roles") in (None, "qkv", "kv") and "window" not in operator
]
"""Every operator and option, without most combinations of roles, which pooling, relations and checkpoints do not see: a
checkpointed block saves its input."""


def spec_of(base: dict[str, Any], operator: dict[str, Any]) -> ModelSpec:
    return parse_model_spec({"heads": 2, "head_dim": 8, **base, **operator})


def random_samples(spec: ModelSpec, batch: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    if isinstance(spec, PatchSpec):
        return torch.randn(batch, *spec.sample_shape).to(dtype), torch.randint(spec.classes, (batch,))
    return torch.randint(spec.vocabulary, (batch, spec.context)), torch.randint(spec.vocabulary, (batch, spec.context))


def counted_bytes(
    spec: ModelSpec,
    batch: int,
    dtype: torch.dtype,
    implementation: str = "grouped",
    autocast: torch.dtype | None = None,
) -> int:
    """Return the bytes of unique storages that autograd saves in forward and loss, without weights and buffers."""
    network = build(spec, implementation=implementation, tile_relations=4).to(dtype)
    own = {t.untyped_storage().data_ptr() for t in (*network.parameters(), *network.buffers())}
    saved: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        address = tensor.untyped_storage().data_ptr()
        if address not in own:
            saved[address] = tensor
        return tensor

    inputs, targets = random_samples(spec, batch, dtype)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        with torch.autocast("cpu", autocast, enabled=autocast is not None):
            logits = network(inputs)
        torch.nn.functional.cross_entropy(logits.flatten(0, -2).float(), targets.flatten())
    return sum(tensor.untyped_storage().nbytes() for tensor in saved.values())


def implementations(operator: dict[str, Any]) -> tuple[Implementation, ...]:
    return ("grouped", "gather") if operator["operator"] in ("translution", "alpha") else ("grouped",)


@pytest.mark.filterwarnings("ignore:.*None of the inputs have requires_grad")
@pytest.mark.parametrize(
    ("name", "operator", "checkpointing"),
    [
        *((name, operator, "none") for name in WHOLE for operator in OPERATORS),
        *((name, operator, "none") for name in OTHERS for operator in KINDS),
        *((name, operator, kind) for name in ("vit", "gpt") for kind in ("block", "offload") for operator in KINDS),
    ],
    ids=str,
)
def test_bytes_saved_for_backward_are_exact(name: str, operator: dict[str, Any], checkpointing: str) -> None:
    spec = spec_of(BASES[name], operator | {"checkpointing": checkpointing})
    runs = [(torch.float32, 3), (torch.bfloat16, 2)]
    if name in ("vit", "gpt") and checkpointing == "none":
        runs.append((torch.float16, 1))
    for implementation in implementations(operator):
        for dtype, batch in runs:
            predicted = saved_bytes(spec, batch, DtypeSizes.of(dtype.itemsize, "cpu"), implementation)
            assert predicted == counted_bytes(spec, batch, dtype, implementation), (implementation, dtype)


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")  # torch's RMSNorm under autocast
@pytest.mark.parametrize(
    ("name", "operator", "checkpointing"),
    [
        *((name, operator, "none") for name in WHOLE for operator in OPERATORS),
        *((name, operator, "none") for name in ("mean", "no-class", "causal") for operator in KINDS),
        *((name, operator, "block") for name in ("vit", "gpt") for operator in KINDS),
    ],
    ids=str,
)
def test_bytes_saved_under_autocast_are_exact(name: str, operator: dict[str, Any], checkpointing: str) -> None:
    spec = spec_of(BASES[name], operator | {"checkpointing": checkpointing})
    for implementation in implementations(operator):
        predicted = saved_bytes(spec, 2, DtypeSizes.autocast("cpu"), implementation)
        counted = counted_bytes(spec, 2, torch.float32, implementation, autocast=torch.bfloat16)
        assert predicted == counted, implementation


def test_a_layer_saves_its_input_and_the_attention_weights_and_nothing_else() -> None:
    layer = Translution(24, 2, head_dim=12, grid=(3, 4), class_token=True, tile_relations=5)
    x = torch.randn(3, 13, 24, requires_grad=True)
    own = {parameter.untyped_storage().data_ptr() for parameter in layer.parameters()}
    saved: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer.tables({"query": x, "key": x, "value": x})
    assert sum(saved.values()) == (3 * 13 * 24 + 3 * 2 * 13 * 13) * 4


@pytest.mark.parametrize(
    ("name", "gibibytes"),
    # Source: the costs table of the operator's specification, one layer of one sample in fp32.
    [("vit-base/16", 256), ("gpt-base/160", 169), ("vit-large/16", 455), ("gpt-base/1024", 6.8 * 1024)],
)
def test_the_published_implementation_saves_as_many_bytes_as_the_paper_states(name: str, gibibytes: float) -> None:
    spec = preset(name)
    saved = saved_bytes(spec, 1, DtypeSizes.of(4, "cuda"), "gather") / spec.depth / 2**30
    assert saved == pytest.approx(gibibytes, rel=0.01)


@pytest.mark.parametrize(
    ("name", "operator"),
    [
        *(("vit", operator) for operator in OPERATORS),
        *((name, operator) for name in ("no-class", "gpt") for operator in KINDS),
    ],
    ids=str,
)
def test_operations_equal_a_counted_run(name: str, operator: dict[str, Any]) -> None:
    spec = spec_of(BASES[name], operator)
    network = build(spec, tile_relations=4)
    inputs, _ = random_samples(spec, 1, torch.float32)
    # torch's counter misses the fused attention of a CPU; the plain one has the same products.
    with sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as forward:
            out = network(inputs)
        with FlopCounterMode(display=False) as backward:
            out.sum().backward()
    flops = count_flops(spec)
    assert forward.get_total_flops() == flops.forward
    assert forward.get_total_flops() + backward.get_total_flops() == flops.training_step
