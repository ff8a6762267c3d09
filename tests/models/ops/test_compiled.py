"""A layer with tables is one custom operator inside a compiled model, and computes what it computes outside."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.operator_pairs import LAYERS
from torch import Tensor, nn

from translution.models import Translution
from translution.models.layers.tables import RelationTables

CASES: list[tuple[type[Any], dict[str, Any]]] = [
    (Translution, {"grid": (2, 3), "class_token": True, "tile_relations": 4}),
    (Translution, {"length": 4, "causal": True, "roles": "kv", "window": 2}),
    (Translution, {"grid": (3, 2, 2), "window": (None, 1, 0), "roles": "v"}),
    (Translution, {"length": 4, "roles": "q"}),
    *((layer, options | {"length": 4, "roles": "qv"}) for layer, options in LAYERS[1:]),
]


class Recorder:
    """A compiler that keeps the graphs and runs them as they are, with the backward that they come with."""

    def __init__(self) -> None:
        self.graphs: list[torch.fx.GraphModule] = []

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        self.graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    def names(self) -> list[str]:
        return [str(node.target) for graph in self.graphs for node in graph.graph.nodes if node.op == "call_function"]


@pytest.fixture(autouse=True)
def _forget_compiled_code() -> None:
    torch._dynamo.reset()


def step(network: nn.Module, original: nn.Module, x: Tensor, mask: Tensor | None = None) -> list[Tensor]:
    """The output, and the gradients of the input and of everything that is trained."""
    torch.manual_seed(1)
    own = x.clone().requires_grad_()
    out = network(own) if mask is None else network(own, mask)
    wanted = [own, *(parameter for parameter in original.parameters() if parameter.requires_grad)]
    return [out, *torch.autograd.grad(out, wanted, torch.ones_like(out))]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "options", "dropout"), [*((*case, 0.0) for case in CASES), *((*case, 0.3) for case in CASES[:2])], ids=str
)
def test_a_compiled_layer_is_one_operator_and_equals_itself(
    kind: type[Any], options: dict[str, Any], dropout: float
) -> None:
    layer, recorder = kind(8, 2, **options, dropout=dropout), Recorder()
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.5)
    x = torch.randn(2, layer.geometry.tokens, 8)
    mask = torch.zeros(2, layer.geometry.tokens, dtype=torch.bool)
    mask[0, 1:3] = True
    compiled = torch.compile(layer, backend=recorder, fullgraph=True)
    for ours, eager in zip(step(compiled, layer, x, mask), step(layer, layer, x, mask), strict=True):
        torch.testing.assert_close(ours, eager, rtol=1e-5, atol=1e-6)
    assert recorder.names().count("translution.attend") == 1
    if dropout:  # In evaluation it is compiled again, without dropout.
        layer.eval()
        torch.testing.assert_close(compiled(x, mask), layer(x, mask), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_a_compiled_model_has_no_break_around_its_layers_and_frozen_tables_no_gradients() -> None:
    torch.manual_seed(0)
    network, recorder = nn.Sequential(nn.Linear(8, 8), Translution(8, 2, grid=(2, 2)), nn.Linear(8, 8)), Recorder()
    x = torch.randn(2, 4, 8)
    for name, parameter in network.named_parameters():
        parameter.requires_grad_("key" not in name)
    compiled = torch.compile(network, backend=recorder)
    for ours, eager in zip(step(compiled, network, x), step(network, network, x), strict=True):
        torch.testing.assert_close(ours, eager, rtol=1e-5, atol=1e-6)
    assert len(recorder.graphs) == 1
    assert recorder.names().count("translution.attend") == 1


@pytest.mark.slow
def test_autocast_reaches_a_compiled_layer() -> None:
    torch.manual_seed(0)
    layer = Translution(16, 2, grid=(2, 2))
    x = torch.randn(2, 4, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        compiled = step(torch.compile(layer, backend="aot_eager", fullgraph=True), layer, x)
        eager = step(layer, layer, x)
    for ours, theirs in zip(compiled, eager, strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["naive", "tile by tile"])
def test_the_reference_and_tiles_that_are_gathered_one_by_one_stay_modules(way: str) -> None:
    layer, recorder = Translution(8, 2, length=3, implementation="naive" if way == "naive" else "auto"), Recorder()
    if way == "tile by tile":
        for parameter in layer.tables.parameters():
            parameter.ds_id = 0  # type: ignore[attr-defined]  # as ZeRO-3 marks what it shards
    x = torch.randn(2, 3, 8)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(layer, backend=recorder)(x), layer(x))
    assert "translution.attend" not in recorder.names()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # torch 2.15 reads it there itself
@pytest.mark.slow
@pytest.mark.parametrize(("kind", "options"), [CASES[0], CASES[1], CASES[4]], ids=str)
def test_the_custom_operator_passes_torchs_own_check(kind: type[Any], options: dict[str, Any]) -> None:
    tables: RelationTables = kind(8, 2, **options).tables
    tokens, found = tables.geometry.tokens, list(tables.parameters())
    plain = [] if kind is Translution else ["plain_query", "plain_key", "plain_value"]
    names = ["query", "key", "value", *plain]
    widths = {name: 8 if name in plain else tables.widths[name not in tables.relative] for name in names}
    rows = [torch.randn(2, tokens, width, requires_grad=True) for width in widths.values()]
    padding = torch.zeros(2, tokens, dtype=torch.bool)
    padding[0, 1] = True
    for mask, dropout in ((None, "0.0"), (padding, "0.3")):
        text = " ".join(("grouped", "None", str(2**20), dropout, *names))
        arguments = (rows, found, mask, torch.tensor(5), tables.description, text)
        torch.library.opcheck(torch.ops.translution.attend.default, arguments)
