"""Draw docs/images/architecture.svg: the packages in layers, from the imports in the sources.

    python scripts/pictures/import_graph.py

A box is a package, or a module that stands directly in a top folder. In a frame, each box stands above all that it
imports. A line is an import that does not follow from other lines; a frame's head names the other frames it imports.
The text on the right is the first sentence of each docstring.
"""

from __future__ import annotations

import ast
import textwrap
from collections.abc import Iterator, Mapping
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PICTURE = ROOT / "docs" / "images" / "architecture.svg"
LAYERS = {
    "cli": "the translution command: one file a command",
    "reports": "tables, pictures and the calculator page",
    "distributed": "training with DeepSpeed, launching, measuring",
    "models": "operators, layers and networks in PyTorch",
    "planner": "costs, memory, time and plans; no torch",
}
"""The top folders, each above those that it may import, with what is in them."""
WIDTH, MARGIN = 1240, 24
GRAPH_WIDTH = 700
"""Width of the boxes' part of a frame; the docstrings stand right of it."""
BOX_HEIGHT, ROW_HEIGHT, HEAD_HEIGHT = 28, 48, 44
NOTE_CHARACTERS, NOTE_HEIGHT = 74, 16
_STYLE = """
  .page { fill: #ffffff } .frame { fill: #f3f5fb; stroke: #aab3d0 } .box { fill: #ffffff; stroke: #3f51b5 }
  .module { stroke-dasharray: 4 3 } .line { stroke: #7683b8; fill: none } .tip { fill: #7683b8 }
  text { font: 14px system-ui, sans-serif; fill: #1d2333 } .name { font-weight: 600; font-size: 16px }
  .note { font-size: 13px; fill: #4d5672 } .strong { font-weight: 600; fill: #1d2333 }
  @media (prefers-color-scheme: dark) {
    .page { fill: #14171f } .frame { fill: #1c2130; stroke: #48527a } .box { fill: #262d42; stroke: #8c9eff }
    .line { stroke: #7f8cc4 } .tip { fill: #7f8cc4 } .note { fill: #aab3d0 } text, .strong { fill: #e7eaf6 }
  }
"""

Graph = dict[str, set[str]]
"""The names that each name imports; a name is `planner/costs`, or `cli/main.py` for a module of a top folder."""


def _node(parts: tuple[str, ...]) -> str:
    """Return the box of a module, given as the parts of its path; the top folder itself for its `__init__`."""
    if len(parts) == 1:
        return parts[0]
    return "/".join(parts[:2]) if (ROOT / parts[0] / parts[1]).is_dir() else f"{parts[0]}/{parts[1]}.py"


def _is_for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def _statements(node: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    """Yield the imports of a module, in functions too, without those that only type checkers read."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child
        elif not _is_for_types(child):
            yield from _statements(child)


def _targets(statement: ast.Import | ast.ImportFrom, package: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """Yield the project's modules that a statement in `package` imports, as parts of their paths."""
    if isinstance(statement, ast.Import):
        names = [tuple(alias.name.split(".")) for alias in statement.names]
        yield from (name[1:] for name in names if name[0] == "translution" and len(name) > 1)
        return
    module = tuple(statement.module.split(".")) if statement.module else ()
    if statement.level:
        base = package[: len(package) - statement.level + 1] + module
    elif module[:1] == ("translution",):
        base = module[1:]
    else:
        return
    for alias in statement.names:
        path = ROOT.joinpath(*base, alias.name)
        found = (*base, alias.name) if path.is_dir() or path.with_suffix(".py").exists() else base
        if found:
            yield found


def graph() -> Graph:
    """Return what each package imports, itself left out."""
    found: Graph = {}
    for top in LAYERS:
        for path in sorted((ROOT / top).rglob("*.py")):
            if path.name == "__main__.py":
                continue
            parts = path.relative_to(ROOT).with_suffix("").parts
            module = parts[:-1] if parts[-1] == "__init__" else parts
            imports = found.setdefault(_node(module), set())
            for statement in _statements(ast.parse(path.read_text(encoding="utf-8"))):
                imports |= {_node(target) for target in _targets(statement, parts[:-1])} - {_node(module)}
    return found


def _reachable(start: str, edges: Mapping[str, set[str]]) -> set[str]:
    seen: set[str] = set()
    waiting = [start]
    while waiting:
        for name in edges.get(waiting.pop(), set()) - seen:
            seen.add(name)
            waiting.append(name)
    return seen


def _rows(edges: Mapping[str, set[str]]) -> list[list[str]]:
    """Return the boxes of a frame in rows, each above all that it imports.

    Raises:
        ValueError: naming packages that import each other.
    """
    below = {name: _reachable(name, edges) for name in edges}
    circles = sorted(name for name in edges if name in below[name])
    if circles:
        raise ValueError(f"packages import each other: {', '.join(circles)}")
    height: dict[str, int] = {}
    for name in sorted(edges, key=lambda name: (len(below[name]), name)):
        height[name] = max((height[other] + 1 for other in edges[name]), default=0)
    rows: list[list[str]] = [[] for _ in range(max(height.values()) + 1)]
    for name in sorted(edges):
        rows[-1 - height[name]].append(name)
    return rows


def _reduced(edges: Mapping[str, set[str]]) -> list[tuple[str, str]]:
    """Return the imports that do not follow from others: a to c is left out where a imports b and b imports c."""
    result = []
    for name in sorted(edges):
        implied = set().union(*(_reachable(other, edges) for other in edges[name])) if edges[name] else set()
        result += [(name, other) for other in sorted(edges[name] - implied)]
    return result


def _text(x: float, y: float, text: str, kind: str = "", anchor: str = "start") -> str:
    attributes = f' class="{kind}"' if kind else ""
    return f'<text{attributes} x="{x:g}" y="{y:g}" text-anchor="{anchor}">{escape(text)}</text>'


def _box_width(name: str) -> int:
    return 9 * len(name) + 28


def _place(rows: list[list[str]], lines: list[tuple[str, str]], top: float) -> dict[str, tuple[float, float]]:
    """Return each box's middle and upper edge; the order in a row follows the boxes above that import it."""
    places: dict[str, tuple[float, float]] = {}
    for number, row in enumerate(rows):
        wanted = {}
        for name in row:
            above = [places[importer][0] for importer, other in lines if other == name and importer in places]
            wanted[name] = sum(above) / len(above) if above else GRAPH_WIDTH / 2
        ordered = sorted(row, key=lambda name: (wanted[name], name))
        widths = [_box_width(_short(name)) for name in ordered]
        gap = (GRAPH_WIDTH - MARGIN - sum(widths)) / (len(row) + 1)
        x = MARGIN + gap
        for name, width in zip(ordered, widths, strict=True):
            places[name] = (x + width / 2, top + number * ROW_HEIGHT)
            x += width + gap
    return places


def _short(name: str) -> str:
    return name.partition("/")[2] or name


def _line(start: tuple[float, float], end: tuple[float, float]) -> str:
    x1, y1, x2, y2 = start[0], start[1] + BOX_HEIGHT, end[0], end[1] - 5
    bend = (y2 - y1) / 2
    return (
        f'<path class="line" d="M{x1:g} {y1:g} C{x1:g} {y1 + bend:g} {x2:g} {y2 - bend:g} {x2:g} {y2:g}" '
        'marker-end="url(#tip)"/>'
    )


def _frame(top: str, edges: Mapping[str, set[str]], y: float) -> tuple[list[str], float]:
    """Return a top folder's drawing, whose upper edge is at `y`, and its height."""
    inside = {name: edges[name] & edges.keys() - {top} for name in edges if name.startswith(f"{top}/")}
    inside = {name: {other for other in targets if other.startswith(f"{top}/")} for name, targets in inside.items()}
    others = {other.partition("/")[0] for targets in edges.values() for other in targets} - {top}
    used = [name for name in LAYERS if name in others and _imports(edges, top, name)]
    rows, lines = _rows(inside), _reduced(inside)
    places = _place(rows, lines, y + HEAD_HEIGHT)
    notes = _notes([name for row in rows for name in row], y + HEAD_HEIGHT + 12)
    height = HEAD_HEIGHT + max((len(rows) - 1) * ROW_HEIGHT + BOX_HEIGHT, len(notes) * NOTE_HEIGHT) + 16
    note = f"{LAYERS[top]} · imports {', '.join(used)}" if used else LAYERS[top]
    drawn = [
        f'<rect class="frame" x="{MARGIN / 2:g}" y="{y:g}" width="{WIDTH - MARGIN}" height="{height:g}" rx="8"/>',
        _text(MARGIN + 4, y + 26, f"{top}/", "name"),
        _text(MARGIN + 20 + 10 * (len(top) + 1), y + 26, note, "note"),
        *(_line(places[name], places[other]) for name, other in lines),
    ]
    for name, (x, upper) in places.items():
        width = _box_width(_short(name))
        kind = "box module" if name.endswith(".py") else "box"
        drawn.append(
            f'<rect class="{kind}" x="{x - width / 2:g}" y="{upper:g}" width="{width}" height="{BOX_HEIGHT}" rx="5"/>'
        )
        drawn.append(_text(x, upper + 19, _short(name), anchor="middle"))
    return drawn + notes, height


def _purpose(name: str) -> str:
    """Return the first sentence of a package's or module's docstring, without its full stop."""
    path = ROOT / name if name.endswith(".py") else ROOT / name / "__init__.py"
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return " ".join(docstring.split("\n\n")[0].split()).split(". ")[0].removesuffix(".").replace("`", "")


def _notes(names: list[str], y: float) -> list[str]:
    """Return the text right of a frame's boxes, one element a line, the first at height `y`."""
    drawn = []
    for name in names:
        for number, line in enumerate(textwrap.wrap(f"{_short(name)}  {_purpose(name)}", NOTE_CHARACTERS)):
            inner = escape(line)
            if number == 0:
                inner = f'<tspan class="strong">{escape(_short(name))}</tspan>{inner[len(escape(_short(name))) :]}'
            x = GRAPH_WIDTH + (16 if number else 0)
            drawn.append(f'<text class="note" x="{x}" y="{y + len(drawn) * NOTE_HEIGHT:g}">{inner}</text>')
    return drawn


def _imports(edges: Mapping[str, set[str]], top: str, other: str) -> bool:
    """Return whether any package of a top folder imports another top folder."""
    sources = [name for name in edges if name.partition("/")[0] == top]
    return any(target.partition("/")[0] == other for name in sources for target in edges[name])


def picture() -> str:
    """Return the SVG: a frame for each top folder, the one that imports most at the top."""
    edges = graph()
    drawn: list[str] = []
    y = MARGIN / 2
    for top in LAYERS:
        part, height = _frame(top, edges, y)
        drawn += part
        y += height + 14
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y:g}" role="img">',
            "<title>The packages in layers: each stands above what it imports</title>",
            f"<style>{_STYLE}</style>",
            '<defs><marker id="tip" viewBox="0 0 8 8" refX="4" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
            '<path class="tip" d="M0 0 L8 4 L0 8 z"/></marker></defs>',
            f'<rect class="page" width="{WIDTH}" height="{y:g}"/>',
            *drawn,
            "</svg>",
            "",
        ]
    )


if __name__ == "__main__":
    PICTURE.parent.mkdir(exist_ok=True)
    PICTURE.write_text(picture(), encoding="utf-8")
