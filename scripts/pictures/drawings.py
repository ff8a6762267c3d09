"""Draw operator.svg, tiles.svg and relations.svg in docs/images: Translution, and two ways to share out its tables.

python scripts/pictures/drawings.py
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path

from translution.planner.config import RelationGeometry, deal_relations

IMAGES = Path(__file__).resolve().parents[2] / "docs" / "images"
SIDE = 4
"""Rows and columns of the drawn grid of tokens."""
OFFSETS = 2 * SIDE - 1
QUERY, KEY = (2, 2), (0, 1)
"""Row and column of the drawn pair of tokens."""
CELL, SMALL = 34, 26
RANKS, TILES = 4, 6
SEQUENCE = RelationGeometry.sequence(4)
"""The drawn tokens whose relations two ranks share out."""
_STYLE = """
  .page { fill: #ffffff } .cell { fill: #f3f5fb; stroke: #aab3d0 } .query { fill: #3f51b5 } .key { fill: #e07a1f }
  .one { fill: #7683b8 } .none { fill: none; stroke: #aab3d0; stroke-dasharray: 3 3 }
  .mark { fill: none; stroke: #1d2333; stroke-width: 2.5 } .arrow { stroke: #1d2333; stroke-width: 1.6; fill: none }
  .tip { fill: #1d2333 } text { font: 14px system-ui, sans-serif; fill: #1d2333 }
  .head { font-weight: 600; font-size: 16px } .note { font-size: 13px; fill: #4d5672 }
  .on { font-weight: 600; font-size: 13px; fill: #ffffff }
  @media (prefers-color-scheme: dark) {
    .page { fill: #14171f } .cell { fill: #1c2130; stroke: #48527a } .one { fill: #7f8cc4 } .none { stroke: #48527a }
    .mark, .arrow { stroke: #e7eaf6 } .tip { fill: #e7eaf6 } text { fill: #e7eaf6 } .note { fill: #aab3d0 }
    .on { fill: #ffffff }
  }
"""


def _square(x: float, y: float, side: float, kind: str, fill: str = "") -> str:
    style = f' style="fill:{fill}"' if fill else ""
    return f'<rect x="{x}" y="{y}" width="{side}" height="{side}" rx="3" class="{kind}"{style}/>'


def _text(x: float, y: float, words: str, kind: str = "", anchor: str = "start") -> str:
    return f'<text x="{x}" y="{y}" class="{kind}" text-anchor="{anchor}">{escape(words)}</text>'


def _arrow(x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" class="arrow" marker-end="url(#tip)"/>'


def _color(row: int, column: int) -> str:
    """Return a color that no other offset has."""
    return f"hsl({round(360 * (row * OFFSETS + column) / OFFSETS**2)} 55% {50 + 4 * (column % 4)}%)"


def _picture(title: str, width: int, height: int, shapes: Sequence[str]) -> str:
    marker = '<marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
    return "\n".join(
        (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img">',
            f"<title>{escape(title)}</title>",
            f"<style>{_STYLE}</style>",
            f'<defs>{marker}<path d="M0 0 L8 4 L0 8 z" class="tip"/></marker></defs>',
            f'<rect width="{width}" height="{height}" class="page"/>',
            *shapes,
            "</svg>\n",
        )
    )


def _tokens(x: float, y: float) -> Iterator[str]:
    """Draw the grid of tokens with a query, a key, and the offset between them."""
    for row in range(SIDE):
        for column in range(SIDE):
            kind = {QUERY: "query", KEY: "key"}.get((row, column), "cell")
            yield _square(x + column * CELL, y + row * CELL, CELL - 3, kind)
    middle = [(x + column * CELL + CELL / 2 - 1.5, y + row * CELL + CELL / 2 - 1.5) for row, column in (QUERY, KEY)]
    yield _text(middle[0][0], middle[0][1] + 5, "i", "on", "middle")
    yield _text(middle[1][0], middle[1][1] + 5, "j", "on", "middle")
    (x1, y1), (x2, y2) = middle
    yield _arrow(x1 - 8, y1 - 14, x2 + 7, y2 + 15)


def _table(x: float, y: float, kind: str) -> Iterator[str]:
    """Draw the matrices of all offsets: one color is one matrix."""
    center = SIDE - 1
    for row in range(OFFSETS):
        for column in range(OFFSETS):
            place = (x + column * SMALL, y + row * SMALL, SMALL - 3)
            if kind == "attention":
                yield _square(*place, "one")
            elif kind == "translution" or max(abs(row - center), abs(column - center)) <= 1:
                yield _square(*place, "offset", _color(row, column))
            else:
                yield _square(*place, "none")
    if kind != "convolution":
        row, column = (center + after - before for before, after in zip(QUERY, KEY, strict=True))
        yield _square(x + column * SMALL - 2, y + row * SMALL - 2, SMALL + 1, "mark")


def operator_picture() -> str:
    """Return the picture of self-attention, convolution and Translution as tables of matrices by offset."""
    shapes = [_text(24, 34, "Two tokens, one offset", "head"), *_tokens(24, 92)]
    shapes += [
        _text(24, 252, "Key j lies 2 rows above and"),
        _text(24, 271, "1 column left of query i."),
        _text(24, 290, f"A grid of {SIDE} × {SIDE} has"),
        _text(24, 309, f"{OFFSETS} × {OFFSETS} = {OFFSETS**2} offsets."),
    ]
    columns = {
        "attention": ("Self-attention", "one matrix for all offsets", "weights depend on the content"),
        "convolution": ("Convolution", "a matrix for each offset of a window", "weights are all the same"),
        "translution": ("Translution", "a matrix for every offset", "weights depend on the content"),
    }
    for number, (kind, (head, matrices, weights)) in enumerate(columns.items()):
        x = 250 + number * 262
        shapes += [_text(x, 34, head, "head"), _text(x, 56, matrices, "note"), *_table(x, 76, kind)]
        shapes.append(_text(x, 76 + OFFSETS * SMALL + 18, weights, "note"))
    shapes += [
        _text(
            250, 312, "qᵢⱼ = xᵢ · Wq[offset j → i],\u2003kᵢⱼ = xⱼ · Wk[offset i → j],\u2003vᵢⱼ = xⱼ · Wv[offset i → j]"
        ),
        _text(250, 336, "oᵢ = Σⱼ softmaxⱼ(⟨qᵢⱼ, kᵢⱼ⟩ / √D) · vᵢⱼ"),
    ]
    return _picture("Self-attention, convolution and Translution: which matrices they have", 1030, 360, shapes)


def _shards(x: float, y: float) -> Iterator[str]:
    """Draw what each rank holds of each tile."""
    for tile in range(TILES):
        yield _text(x + 62 + tile * 64 + 28, y - 8, f"tile {tile + 1}", "note", "middle")
    for rank in range(RANKS):
        yield _text(x, y + rank * 24 + 14, f"rank {rank}", "note")
        for tile in range(TILES):
            fill = f"hsl({round(360 * tile / TILES)} 55% 56%)"
            place = f'x="{x + 62 + tile * 64}" y="{y + rank * 24}" width="56" height="18" rx="3"'
            yield f'<rect {place} style="fill:{fill}"/>'


def _times(x: float, y: float) -> Iterator[str]:
    """Draw which tile is whole on every rank at which time."""
    for tile in range(TILES):
        left, fill = x + tile * 80, f"hsl({round(360 * tile / TILES)} 55% 56%)"
        yield f'<rect x="{left}" y="{y}" width="72" height="{RANKS * 24 - 6}" rx="3" style="fill:{fill}"/>'
        yield _text(left + 36, y + 42, "products", "on", "middle")
        yield _text(left + 36, y + 60, f"of tile {tile + 1}", "on", "middle")
        if tile:
            yield _arrow(left - 18, y + RANKS * 24 + 12, left - 2, y + RANKS * 24 + 12)
        yield _text(left + 34, y + RANKS * 24 + 16, "release", "note", "middle")
        yield _text(left + 36, y - 8, "gather", "note", "middle")


def tiles_picture() -> str:
    """Return the picture of a table in tiles that ZeRO-3 shards, and that each layer gathers one after the other."""
    shapes = [
        _text(24, 34, "Between uses: each rank holds a part of each tile", "head"),
        *_shards(24, 76),
        _text(24, 206, "A tile holds the matrices of some relations; a table of", "note"),
        _text(24, 225, "ViT-Base/16 has 732 matrices of 768 × 768.", "note"),
        _text(520, 34, "In a layer: every rank has one whole tile at a time", "head"),
        *_times(520, 76),
        _text(520, 225, "Memory for weights: one tile, whatever the size of the table.", "note"),
    ]
    return _picture("A table in tiles: sharded over the ranks, gathered one after the other", 1030, 250, shapes)


def _strip(x: float, y: float, kind: str) -> Iterator[str]:
    """Draw the tokens of one sample below each other."""
    for token in range(SEQUENCE.tokens):
        yield _square(x, y + token * 20, 17, kind)


def _matrix(x: float, y: float, drawn: Sequence[int]) -> Iterator[str]:
    """Draw the pairs of one sample, colored by owner; those of other owners than the drawn ones are empty."""
    owners = deal_relations(SEQUENCE, 2)
    for query in range(SEQUENCE.tokens):
        for key in range(SEQUENCE.tokens):
            relation = SEQUENCE.relation(query, key)
            assert relation is not None
            owner = owners[relation]
            kind = ("query", "key")[owner] if owner in drawn else "none"
            yield _square(x + key * 20, y + query * 20, 17, kind)


def _step(x: float, number: int, lines: Sequence[str]) -> Iterator[str]:
    yield _text(x, 34, f"{number}. {lines[0]}", "head")
    for place, line in enumerate(lines[1:]):
        yield _text(x, 54 + 18 * place, line, "note")


def relations_picture() -> str:
    """Return the picture of the five steps of a layer whose relations two ranks share out."""
    shapes = [
        *_step(90, 1, ("Gather tokens", "every rank gets the", "tokens of all samples")),
        *_step(265, 2, ("Logits", "of the rank's own relations,", "for all samples")),
        *_step(500, 3, ("Softmax", "all logits of a sample", "go to its rank")),
        *_step(690, 4, ("Exchange back", "weights go to the owners", "of the relations")),
        *_step(925, 5, ("Sum of values", "parts of the output go to", "the sample's rank")),
    ]
    for rank in range(2):
        y, sample = 120 + rank * 120, "AB"[rank]
        shapes += [_text(24, y + 36, f"rank {rank}"), _text(24, y + 56, f"sample {sample}", "note")]
        for place, name in enumerate("AB"):
            left = 90 + place * 60
            shapes += [*_strip(left, y, "one"), _text(left + 8, y - 8, name, "note", "middle")]
            for begin in (265, 690):
                middle = begin + place * 95
                shapes += [*_matrix(middle, y, (rank,)), _text(middle + 38, y - 8, name, "note", "middle")]
        shapes += [*_matrix(520, y, (0, 1)), _text(558, y - 8, sample, "note", "middle")]
        shapes += [*_strip(960, y, "one"), _text(968, y - 8, sample, "note", "middle")]
        shapes += [
            _arrow(begin, y + 38, end, y + 38) for begin, end in ((185, 250), (455, 505), (610, 675), (880, 940))
        ]
    shapes.append(_text(24, 370, "Blue pairs have a relation of rank 0, orange ones of rank 1.", "note"))
    shapes.append(_text(24, 390, "No table is sent; backward takes the same way in reverse.", "note"))
    return _picture("Relation parallelism: tokens travel to the tables in five steps", 1110, 410, shapes)


PICTURES = {"operator": operator_picture, "tiles": tiles_picture, "relations": relations_picture}

if __name__ == "__main__":
    for name, draw in PICTURES.items():
        (IMAGES / f"{name}.svg").write_text(draw(), encoding="utf-8")
        print(f"wrote docs/images/{name}.svg")
