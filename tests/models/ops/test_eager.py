"""Operators run eagerly inside compiled models, and torch's compiler is loaded only for those."""

from __future__ import annotations

import subprocess
import sys

import torch
from torch import Tensor, nn

from translution.models.layers.translution import Translution
from translution.models.ops.eager import call_eagerly


def test_a_function_is_not_compiled_with_what_calls_it() -> None:
    seen: list[bool] = []

    def inner(x: Tensor) -> Tensor:
        seen.append(torch.compiler.is_compiling())
        return x * 2

    def outer(x: Tensor) -> Tensor:
        return call_eagerly(inner, x + 1) + 1

    x = torch.arange(3.0)
    compiled = torch.compile(outer, backend="eager")
    torch.testing.assert_close(compiled(x), outer(x))
    assert seen == [False, False]


def test_the_operators_of_a_compiled_model_run_eagerly() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(8, 8), Translution(8, 2, grid=(2, 2)), nn.Linear(8, 8))
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, _: object) -> object:
        graphs.append(graph)
        return graph.forward

    x = torch.randn(2, 4, 8)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(network, backend=backend)(x), network(x))
    called = [str(node.target) for graph in graphs for node in graph.graph.nodes if node.op == "call_function"]
    # The linear layers around it are compiled; no softmax or product of the operator is.
    assert any("linear" in name for name in called)
    assert not any("softmax" in name or "bmm" in name or "index" in name for name in called)


def test_layers_are_imported_without_torchs_compiler() -> None:
    code = "import sys, translution.models as models; models.Translution; print('torch._dynamo' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
