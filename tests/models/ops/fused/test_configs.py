"""Sizes of the fused kernels' blocks, and the choice among them."""

from __future__ import annotations

import itertools

import pytest
import torch

from translution.models.ops.fused import configs
from translution.models.ops.fused.configs import CANDIDATES, KernelConfig, choose_config, fitted, heads_and_columns


@pytest.mark.parametrize(
    ("heads", "head_dim", "columns", "expected"),
    [
        (12, 64, 64, (1, 64)),
        (12, 64, 128, (2, 64)),
        (12, 12, 64, (4, 16)),
        (3, 8, 64, (4, 8)),
        (1, 8, 64, (2, 8)),
        (2, 1, 64, (16, 1)),
        (2, 256, 64, (1, 256)),
    ],
)
def test_a_program_has_whole_heads_and_at_least_16_columns(
    heads: int, head_dim: int, columns: int, expected: tuple[int, int]
) -> None:
    assert heads_and_columns(heads, head_dim, columns) == expected


@pytest.mark.parametrize("width", [16, 64, 128, 256])
@pytest.mark.parametrize("element_bytes", [2, 4])
def test_wide_heads_and_elements_have_smaller_blocks(element_bytes: int, width: int) -> None:
    for config in itertools.chain(*CANDIDATES.values()):
        found = fitted(config, element_bytes, width)
        assert min(found.rows, found.inner) >= 16
        columns = max(width, config.columns)
        assert found.rows * columns <= max(config.rows * config.columns, 16 * columns)
        assert found.inner * columns * element_bytes <= max(
            config.inner * config.columns * 2, 16 * columns * element_bytes
        )


@pytest.mark.parametrize(("timed", "expected"), [(True, 2), (False, 1)])
def test_the_choice_is_made_once_among_those_that_work(
    timed: bool, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    offered = tuple(KernelConfig(16 << n, 16, 16, 4, 1) for n in range(4))
    seconds = dict(zip(offered, (float("inf"), 2.0, 1.0, 3.0), strict=True))
    monkeypatch.setattr(configs, "_chosen", {})
    monkeypatch.setattr(configs, "_seconds", lambda launch, config: seconds[config])
    compiled: list[KernelConfig] = []
    monkeypatch.setattr(configs, "_compile_together", lambda configurations, launch: compiled.extend(configurations))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert choose_config("key", offered, lambda config: None, timed=timed) == offered[expected]
    assert compiled == (list(offered) if timed else [])
    monkeypatch.setattr(configs, "_seconds", None)
    assert choose_config("key", offered, lambda config: None, timed=timed) == offered[expected]


def test_it_raises_the_error_if_none_works(monkeypatch: pytest.MonkeyPatch) -> None:
    def launch(config: KernelConfig) -> None:
        raise RuntimeError("out of resources")

    monkeypatch.setattr(configs, "_seconds", lambda launch, config: float("inf"))
    monkeypatch.setattr(configs, "_compile_together", lambda configurations, launch: None)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    with pytest.raises(RuntimeError, match="out of resources"):
        choose_config("none", CANDIDATES["logits_kernel"], launch, timed=True)
