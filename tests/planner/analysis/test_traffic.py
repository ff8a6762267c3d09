"""What ZeRO-3 and relation parallelism send, against figures of others and where both send as much."""

from __future__ import annotations

import pytest

from translution.planner.analysis.traffic import crossing_samples, row_crossing_samples, traffic_points
from translution.planner.config.loading import preset
from translution.planner.config.model import override
from translution.planner.costs.relation_traffic import relation_parallel_traffic, zero3_table_traffic

BASE = preset("vit-base/16")
FOREIGN = (
    (1, 81.6, 0.13, 91.8, 1.1),
    (8, 81.6, 1.0, 91.8, 9.2),
    (32, 81.6, 4.1, 91.8, 36.6),
    (80, 81.6, 10.2, 91.8, 91.5),
)
"""GB of ViT-Base/16 in half precision: samples per GPU, then ZeRO-3 and rows of tokens on 8 and on 64 GPUs.

Source: the specification of relation parallelism, which counts five passes of rows and no pairs.
"""


@pytest.mark.parametrize(("batch", "zero3_8", "rows_8", "zero3_64", "rows_64"), FOREIGN)
def test_tables_and_rows_are_those_of_the_specification(
    batch: int, zero3_8: float, rows_8: float, zero3_64: float, rows_64: float
) -> None:
    for ranks, zero3, rows in ((8, zero3_8, rows_8), (64, zero3_64, rows_64)):
        (point,) = traffic_points(BASE, (ranks,), (batch,))
        assert point.zero3_bytes / 1e9 == pytest.approx(zero3, abs=0.05)
        sent = relation_parallel_traffic(BASE, ranks=ranks, batch=batch)
        assert round(sent.rows / 1e9, 2 if rows < 1 else 1) == rows
        assert point.relation_bytes == sent.total > sent.rows


def test_rows_alone_send_as_much_at_the_published_number_of_samples() -> None:
    """9 · R · C / (5 · N) with 732 relations, width 768 and 197 tokens: 5,140 by the specification."""
    assert row_crossing_samples(BASE) == pytest.approx(9 * 732 * 768 / (5 * 197))
    assert row_crossing_samples(BASE) == pytest.approx(5140, rel=0.001)
    # Of one table only the values' part of the passes remains: rows twice forward and back, and once again.
    values = override(BASE, roles="v")
    assert row_crossing_samples(values) == pytest.approx(3 * 732 * 768 / (5 * 197))


@pytest.mark.parametrize("model", ["vit-base/16", "gpt-base/1024", "vit-tiny/56"])
@pytest.mark.parametrize("ranks", [2, 8, 64])
def test_more_is_sent_exactly_above_the_crossing(model: str, ranks: int) -> None:
    spec = override(preset(model), dropout=0.1)
    if ranks > spec.geometry.relations:
        assert not list(traffic_points(spec, (ranks,)))
        return
    batch = crossing_samples(spec, ranks) / ranks
    below, above = (relation_parallel_traffic(spec, ranks=ranks, batch=n).total for n in (int(batch), int(batch) + 1))
    assert below <= zero3_table_traffic(spec, ranks=ranks) < above
    # Pairs come on top of rows.
    assert crossing_samples(spec, ranks) < row_crossing_samples(spec)
