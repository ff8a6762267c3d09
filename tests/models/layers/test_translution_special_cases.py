"""Self-attention and convolution as special cases of Translution, and equivariance to moved patterns."""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import pytest
import torch
from helpers.operator_pairs import LAYERS, LAYOUTS
from torch import Tensor, nn

from translution.models import AbsoluteTranslution, BiasAttention, SelfAttention, ShawAttention, Translution
from translution.models.layers.tables import RelationTables
from translution.planner.config.geometry import RelationGeometry


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if "window" not in layout], ids=str)
def test_translution_with_equal_matrices_is_self_attention(layout: dict[str, Any]) -> None:
    torch.manual_seed(0)
    ours, attention = Translution(6, 2, tile_relations=3, **layout), SelfAttention(6, 2, **layout)
    matrices = attention.projections.weight.detach().view(3, 6, 6)
    for role, matrix in zip(("query", "key", "value"), matrices, strict=True):
        ours.tables.load_table(role, matrix.t().expand(ours.geometry.relations, 6, 6))
    ours.output.load_state_dict(attention.output.state_dict())
    x = torch.randn(3, ours.geometry.tokens, 6)
    torch.testing.assert_close(ours(x), attention(x), rtol=0, atol=1e-12)


@pytest.mark.usefixtures("double")
def test_a_window_with_uniform_weights_is_a_convolution() -> None:
    """The relations within one step of a token form a 3×3 kernel; inside the grid all weights are 1/9."""
    torch.manual_seed(0)
    geometry = RelationGeometry.grid(5, 6, window=1)
    tables = RelationTables(geometry, 2, 4, 6, roles="v", scale=1.0, tile_relations=4)
    weight = torch.randn(6, 4, 3, 3)
    # Relation r is the offset query − key; conv2d reads its input at key − query.
    tables.load_table("value", weight.flatten(2).flip(2).permute(2, 1, 0))
    image = torch.randn(2, 4, 5, 6)
    constant = torch.ones(2, 30, 4)
    out, _ = tables({"plain_query": constant, "plain_key": constant, "value": image.flatten(2).transpose(1, 2)})
    assert out is not None
    convolved = nn.functional.conv2d(image, weight, padding=1)
    inside = (out.transpose(1, 2).unflatten(2, (5, 6)) * 9)[:, :, 1:-1, 1:-1]
    torch.testing.assert_close(inside, convolved[:, :, 1:-1, 1:-1], rtol=0, atol=1e-12)


@pytest.mark.usefixtures("double")
def test_a_window_on_a_clip_with_uniform_weights_is_a_convolution() -> None:
    """A window of one frame, two rows and one column is a 3×5×3 kernel; inside the clip all weights are 1/45."""
    torch.manual_seed(0)
    geometry = RelationGeometry.grid(4, 6, 5, window=(1, 2, 1))
    tables = RelationTables(geometry, 2, 4, 6, roles="v", scale=1.0, tile_relations=4)
    weight = torch.randn(6, 4, 3, 5, 3)
    tables.load_table("value", weight.flatten(2).flip(2).permute(2, 1, 0))
    clip = torch.randn(2, 4, 4, 6, 5)
    constant = torch.ones(2, 120, 4)
    out, _ = tables({"plain_query": constant, "plain_key": constant, "value": clip.flatten(2).transpose(1, 2)})
    assert out is not None
    convolved = nn.functional.conv3d(clip, weight, padding=(1, 2, 1))
    found = out.transpose(1, 2).unflatten(2, (4, 6, 5)) * 45
    inside = (slice(None), slice(None), slice(1, -1), slice(2, -2), slice(1, -1))
    torch.testing.assert_close(found[inside], convolved[inside], rtol=0, atol=1e-12)


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("implementation", ["grouped", "batched", "gather"])
def test_a_clip_is_attended_with_a_matrix_per_offset(causal: bool, implementation: str) -> None:
    """The equations of arXiv 2510.10060, section 3, token by token on a 3-D grid, without any relation's number."""
    torch.manual_seed(0)
    axes, heads, dim = (2, 3, 2), 2, 6
    layer = Translution(dim, heads, grid=axes, causal=causal, implementation=implementation, tile_relations=4)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.5)
    places = list(product(*map(range, axes)))
    spans = [range(0 if causal and not axis else 1 - extent, extent) for axis, extent in enumerate(axes)]
    # Offsets from key to query in row-major order; the query's table is numbered by the reversed offset.
    order = {offset: number for number, offset in enumerate(product(*spans))}
    tables = {name: layer.tables.table(name) for name in ("query", "key", "value")}
    x = torch.randn(12, dim)
    rows = []
    for i, here in enumerate(places):
        logits, values = [], []
        for j, there in enumerate(places):
            offset = tuple(a - b for a, b in zip(here, there, strict=True))
            if offset not in order:
                continue
            back = order[offset] if causal else order[tuple(-step for step in offset)]
            query, key, value = (
                (x[token] @ tables[name][number]).view(heads, -1)
                for token, name, number in ((i, "query", back), (j, "key", order[offset]), (j, "value", order[offset]))
            )
            logits.append((query * key).sum(1) / (dim // heads) ** 0.5)
            values.append(value)
        weights = torch.stack(logits).softmax(0)
        rows.append((weights[:, :, None] * torch.stack(values)).sum(0).flatten())
    torch.testing.assert_close(layer(x[None])[0], layer.output(torch.stack(rows)), rtol=0, atol=1e-12)


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("frame", [(2, 2), ()], ids=["clip", "one patch a frame"])
def test_later_frames_do_not_change_earlier_ones(frame: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    last = 1 + 2 * math.prod(frame)
    for layer, options in [*LAYERS, (SelfAttention, {"rotary": True}), (BiasAttention, {}), (ShawAttention, {})]:
        ours = layer(16, 2, grid=(3, *frame), causal=True, class_token=True, **options)
        x = torch.randn(1, 1 + 3 * math.prod(frame), 16)
        changed = x.clone()
        changed[:, last:] += 1
        before, after = ours(x), ours(changed)
        torch.testing.assert_close(after[:, 1:last], before[:, 1:last], rtol=0, atol=1e-12)
        assert ((after - before)[:, [0, *range(last, x.shape[1])]].abs().amax(2) > 1e-4).all()


@pytest.mark.usefixtures("double")
def test_uniform_weights_over_all_offsets_are_a_convolution() -> None:
    """With constant queries and keys all attention weights are equal, and the value table is the kernel.

    On an H×W grid the kernel spans (2H−1)×(2W−1) offsets, zero-padding corresponds to pairs that do not
    exist, and all weights are 1/(H·W).
    """
    torch.manual_seed(0)
    height, width, kernel = 5, 6, 3
    geometry = RelationGeometry.grid(height, width)
    tables = RelationTables(geometry, 2, 4, 6, roles="v", scale=1.0, tile_relations=7)
    values = torch.zeros(geometry.relations, 4, 6)
    weight = torch.randn(6, 4, kernel, kernel)
    for dy in range(kernel):
        for dx in range(kernel):
            # conv2d reads the input at offset (dy − 1, dx − 1) from the output; a relation is output − input.
            relation = (height - 1 - (dy - 1)) * (2 * width - 1) + width - 1 - (dx - 1)
            values[relation] = weight[:, :, dy, dx].t()
    tables.load_table("value", values)
    image = torch.randn(2, 4, height, width)
    x = image.flatten(2).transpose(1, 2)
    constant = torch.ones(2, height * width, 4)
    out, _ = tables({"plain_query": constant, "plain_key": constant, "value": x})
    assert out is not None
    convolved = nn.functional.conv2d(image, weight, padding=1).flatten(2).transpose(1, 2)
    torch.testing.assert_close(out * (height * width), convolved, rtol=0, atol=1e-12)


def placed(layer: nn.Module, pattern: Tensor, row: int, col: int, positions: Tensor | None = None) -> Tensor:
    """The layer's output at a 2×3 pattern placed at (row, col) of a 4×5 grid; the rest is masked noise."""
    canvas, mask = torch.randn(4, 5, 8), torch.ones(4, 5, dtype=torch.bool)
    canvas[row : row + 2, col : col + 3], mask[row : row + 2, col : col + 3] = pattern, False
    x = canvas.flatten(0, 1) + (0 if positions is None else positions)
    out: Tensor = layer(x[None], mask.flatten()[None]).view(4, 5, 8)
    return out[row : row + 2, col : col + 3]


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize(
    ("layer", "options"),
    [*LAYERS, (SelfAttention, {"rotary": True}), (BiasAttention, {}), (ShawAttention, {})],
    ids=["full", "alpha", "alpha-rotary", "rotary", "bias", "shaw"],
)
def test_moving_a_pattern_does_not_change_its_output(layer: type[Any], options: dict[str, Any]) -> None:
    """Relative operators are equivariant; adding learned positions breaks that."""
    torch.manual_seed(0)
    ours = layer(8, 2, grid=(4, 5), **options)
    pattern, positions = torch.randn(2, 3, 8), torch.randn(20, 8)
    expected = placed(ours, pattern, 0, 0)
    for row, col in ((2, 0), (1, 2), (0, 1)):
        torch.testing.assert_close(placed(ours, pattern, row, col), expected, rtol=0, atol=1e-12)
    absolute = [placed(ours, pattern, *layout, positions) for layout in ((1, 2), (0, 0))]
    assert (absolute[0] - absolute[1]).abs().max() > 1e-2


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("roles", ["qkv", "q", "v"])
def test_moving_a_pattern_changes_its_output_under_absolute_matrices(roles: str) -> None:
    torch.manual_seed(0)
    ours, pattern = AbsoluteTranslution(8, 2, grid=(4, 5), roles=roles), torch.randn(2, 3, 8)
    assert (placed(ours, pattern, 1, 2) - placed(ours, pattern, 0, 0)).abs().max() > 1e-2
