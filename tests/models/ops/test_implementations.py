"""Which implementation of the operator a call uses: by argument, environment variable, device, dtype and widths."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from translution.models import AlphaTranslution, Translution
from translution.models.layers import tables
from translution.models.ops import batched, grouped, implementations
from translution.models.ops.context import RelationContext
from translution.models.ops.fused import FusedTile, support
from translution.models.ops.implementations import IMPLEMENTATION_VARIABLE, choose_implementation
from translution.planner.common import InputError

GPU, CPU = torch.device("cuda"), torch.device("cpu")
WIDTHS = (64, 32)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU with everything that the fused operator needs, as far as the choice asks for it."""
    monkeypatch.delenv(IMPLEMENTATION_VARIABLE, raising=False)
    monkeypatch.setattr(support.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(implementations, "fused_is_correct", lambda *_: True)


@pytest.mark.usefixtures("gpu")
def test_a_gpu_takes_the_fused_operator_where_it_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    def choice(dtype: torch.dtype = torch.bfloat16, widths: tuple[int, int] = WIDTHS, heads: int = 2) -> str:
        return choose_implementation("auto", GPU, dtype, widths, heads)

    assert choice() == choice(torch.float16) == "fused"
    assert choice(torch.float32) == choice(torch.float64) == "batched"
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    assert choice(torch.float32) == "fused"
    assert choice(widths=(60, 32)) == choice(widths=(64, 36)) == "batched"
    assert choice(widths=(64, 512), heads=1) == "batched"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert choice() == "batched"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert choice() == "fused"
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert choice() == "batched"
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(implementations, "fused_is_correct", lambda *_: False)
    assert choice() == "batched"
    monkeypatch.setattr(implementations, "fused_is_correct", lambda *_: True)
    monkeypatch.setattr(support.importlib.util, "find_spec", lambda name: None)
    assert choice() == "batched"


@pytest.mark.usefixtures("gpu")
def test_argument_and_environment_variable_force_an_implementation(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("batched", "grouped", "naive"):
        assert choose_implementation(name, GPU, torch.bfloat16, WIDTHS, 2) == name
        monkeypatch.setenv(IMPLEMENTATION_VARIABLE, name)
        assert choose_implementation("auto", GPU, torch.bfloat16, WIDTHS, 2) == name
        assert choose_implementation("fused", GPU, torch.bfloat16, WIDTHS, 2) == "fused"
    monkeypatch.setenv(IMPLEMENTATION_VARIABLE, "gather")
    assert choose_implementation("auto", CPU, torch.bfloat16, WIDTHS, 2) == "naive"
    monkeypatch.setenv(IMPLEMENTATION_VARIABLE, "")
    assert choose_implementation("auto", CPU, torch.bfloat16, WIDTHS, 2) == "grouped"


def test_what_cannot_be_used_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(support.importlib.util, "find_spec", lambda name: object())
    with pytest.raises(InputError, match=r"^implementation: 'fused' is not allowed: it needs an NVIDIA GPU$"):
        choose_implementation("fused", CPU, torch.bfloat16, WIDTHS, 2)
    monkeypatch.setenv(IMPLEMENTATION_VARIABLE, "fused")
    with pytest.raises(
        InputError, match=rf"^{IMPLEMENTATION_VARIABLE}: 'fused' is not allowed: it computes in .*float64$"
    ):
        choose_implementation("auto", GPU, torch.float64, WIDTHS, 2)
    monkeypatch.setattr(support.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"it needs the package triton$"):
        choose_implementation("auto", GPU, torch.bfloat16, WIDTHS, 2)
    monkeypatch.setenv(IMPLEMENTATION_VARIABLE, "quick")
    with pytest.raises(
        InputError, match=rf"^{IMPLEMENTATION_VARIABLE}: 'quick' is not allowed: must be one of auto, fused"
    ):
        choose_implementation("auto", CPU, torch.bfloat16, WIDTHS, 2)
    with pytest.raises(
        InputError, match=r"^implementation: 'quick' is not allowed: must be one of auto, fused, batched"
    ):
        Translution(8, 2, length=2, implementation="quick")


def test_a_layer_computes_with_the_chosen_implementation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(IMPLEMENTATION_VARIABLE, raising=False)
    called: list[str] = []

    class Tile:
        """A tile that computes nothing and leaves every relation to the grouped operator."""

        def __init__(self, context: RelationContext, first: int, count: int) -> None:
            self.leftover = range(first, first + count)
            called.append(context.implementation)

        def add_logits(self, *_: object) -> None: ...

        logits_backward = add_values = values_backward = add_logits

    def reference(*_: object) -> tuple[Tensor, None]:
        called.append("naive")
        return torch.zeros(1, 2, 8, requires_grad=True), None

    monkeypatch.setattr(grouped, "BatchedTile", Tile)
    monkeypatch.setattr(grouped, "FusedTile", Tile)
    monkeypatch.setattr(tables, "gather_attention", reference)
    monkeypatch.setattr(implementations, "fused_problem", lambda *_: None)
    kinds: list[tuple[type[Any], dict[str, int]]] = [(Translution, {}), (AlphaTranslution, {"c1": 4, "c2": 4})]
    for name, calls in (
        ("fused", ["fused"] * 4),
        ("batched", ["batched"] * 4),
        ("grouped", []),
        ("auto", []),
        ("naive", ["naive"]),
        ("gather", ["naive"]),
    ):
        for kind, options in kinds if name not in ("naive", "gather") else kinds[:1]:
            called.clear()
            layer = kind(8, 2, length=2, implementation=name, **options)
            # Logits and values, forward and backward.
            layer(torch.zeros(1, 2, 8, requires_grad=True)).sum().backward()
            assert called == calls, name


def test_every_way_offers_what_the_chain_calls() -> None:
    methods = {"add_logits", "logits_backward", "add_values", "values_backward"}
    for kind in (FusedTile, batched.BatchedTile):
        assert methods <= set(vars(kind))


def test_layers_are_imported_without_triton() -> None:
    code = """import sys, torch, translution.models as models
layer = models.Translution(8, 2, length=2)
layer(torch.zeros(1, 2, 8)).sum().backward()
print('triton' in sys.modules)"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
