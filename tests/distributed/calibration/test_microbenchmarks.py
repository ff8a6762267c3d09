"""Rates of products and of elementwise work, on the CPU that is there."""

from __future__ import annotations

import pytest
import torch

from translution.distributed.calibration import microbenchmarks
from translution.distributed.calibration.microbenchmarks import Stopwatch, measure_matmul


@pytest.mark.parametrize("together", [False, True])
def test_a_rate_counts_every_product_of_a_call(together: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock that a call moves by one second, a rate is the FLOPs of a call."""
    calls: list[int] = []
    for name in ("mm", "bmm"):
        true = getattr(torch, name)

        def spy(*factors: torch.Tensor, true: object = true, **options: object) -> torch.Tensor:
            calls.append(1 if factors[0].dim() == 2 else len(factors[0]))
            assert callable(true)
            result: torch.Tensor = true(*factors, **options)
            return result

        monkeypatch.setattr(torch, name, spy)

    def second(self: Stopwatch, work: object) -> float:
        assert callable(work)
        work()
        return 1.0

    monkeypatch.setattr(Stopwatch, "seconds", second)
    monkeypatch.setattr(microbenchmarks, "_GPU_MATRIX_BYTES", 10 * 64 * 64 * 4)
    rates = list(measure_matmul(Stopwatch("cpu"), ("fp32",), quick=True, together=together))
    assert [rate.rows for rate in rates] == [1, 64]
    assert calls == ([10, 10] if together else [1, 1])
    for rate, count in zip(rates, calls, strict=True):
        assert rate.flops_per_s == count * 2 * rate.rows * 64 * 64


def test_a_gpus_call_holds_no_more_than_its_limit() -> None:
    """The largest product of a calibration, in fp32: rows, products and matrices of all products of a call."""
    count, _ = microbenchmarks._products("meta", "fp32", 4096, 768, together=True)
    assert 2 * count * 4096 * 768 * 4 <= 2**30
    assert count * 768 * 768 * 4 <= 2**29
    assert 2 * count * 4096 * 768**2 / 990e12 > 1e-4  # Longer than the call itself on the fastest card.
