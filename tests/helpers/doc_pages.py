"""Commands, outputs and programs on documentation pages, and comparison of an output with what was printed."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = (
    "translution",
    "make",
    "python",
    "sbatch",
    "cd",
    "pip",
    "export",
    "sh",
    "tensorboard",
    "torchrun",
    "sudo",
    "apt-get",
)
"""First words of commands in indented blocks; in a ``sh`` or ``console`` fence every line is a command."""
_UNIT = r"(?:[KMGTP]iB|[kMGTP]?FLOP|ms|s|B|k|M|G|T)"


def reader_pages() -> list[Path]:
    """Return the README and the pages in docs/ and its folders."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


@dataclass(frozen=True)
class Shown:
    """A command on a page."""

    page: str
    line: int
    text: str
    output: tuple[str, ...] | None
    """Lines below the command; None if the page shows none."""

    def __str__(self) -> str:
        return f"{self.page}:{self.line}: {self.text}"

    @property
    def words(self) -> list[str]:
        """Words as a shell splits them, without leading variable assignments and ``cd … &&``."""
        words = shlex.split(self.text, comments=True)
        if "&&" in words:
            words = words[len(words) - words[::-1].index("&&") :]
        while words and re.match(r"[A-Z_]+=", words[0]):
            words = words[1:]
        return words

    @property
    def options(self) -> list[str]:
        return sorted({word.partition("=")[0] for word in self.words if word.startswith("--")})

    @property
    def kind(self) -> str:
        """Subcommand with the names of its options, or another program with its first argument."""
        words = self.words
        if words[0] == "translution":
            return " ".join([words[1], *self.options])
        return " ".join(words[:2])


@dataclass(frozen=True)
class Fence:
    language: str
    line: int
    lines: tuple[str, ...]


def fences(text: str) -> Iterator[Fence]:
    """Yield the fenced blocks of a page, and its indented blocks with the language ``indented``."""
    lines = text.splitlines()
    number = 0
    while number < len(lines):
        start = number
        if lines[number].startswith("```"):
            language = lines[number][3:].strip()
            number += 1
            while lines[number] != "```":
                number += 1
            yield Fence(language, start + 2, tuple(lines[start + 1 : number]))
        elif lines[number].startswith("    "):
            while number < len(lines) and lines[number].startswith("    "):
                number += 1
            yield Fence("indented", start + 1, tuple(line[4:] for line in lines[start:number]))
            continue
        number += 1


def _joined(fence: Fence) -> Iterator[tuple[int, str]]:
    """Yield lines with their numbers; lines that end in a backslash are joined with the next one."""
    pending, first = "", 0
    for number, line in enumerate(fence.lines, fence.line):
        first = first if pending else number
        if line.endswith("\\"):
            pending += line[:-1]
            continue
        yield first, pending + (line.lstrip() if pending else line)
        pending = ""


def commands(page: Path) -> list[Shown]:
    """Return the commands of a page in order."""
    found: list[Shown] = []
    name = str(page.relative_to(ROOT))
    for fence in fences(page.read_text(encoding="utf-8")):
        if fence.language == "console":
            found += _of_console(name, fence)
        elif fence.language in ("sh", "indented"):
            for number, line in _joined(fence):
                typed = bool(line.strip()) and not line.startswith("#")
                if typed and (fence.language == "sh" or line.split()[0] in PROGRAMS):
                    found.append(Shown(name, number, line.strip(), None))
    return found


def _of_console(name: str, fence: Fence) -> list[Shown]:
    """Return the commands after a dollar sign, each with the lines below it."""
    found: list[Shown] = []
    output: list[str] = []
    for number, line in [*_joined(fence), (0, "$ ")]:
        if line.startswith("$ "):
            if found:
                found[-1] = Shown(name, found[-1].line, found[-1].text, tuple(output) if output else None)
            output = []
            if number:
                found.append(Shown(name, number, line[2:], None))
        else:
            output.append(line)
    return found


def programs(page: Path) -> list[Fence]:
    """Return the Python blocks of a page."""
    return [fence for fence in fences(page.read_text(encoding="utf-8")) if fence.language == "python"]


def shape(line: str) -> str:
    """Return a line without its figures, and with table rules and spaces of any width made equal."""
    line = re.sub(r"[━─═]+", "─", line)
    line = re.sub(rf"-?\d+(?:,\d{{3}})*(?:\.\d+)?(?:e[-+]?\d+)?%?(?: ?{_UNIT}\b)?", "#", line)
    return re.sub(r"\s+", " ", line).strip()


def _line_pattern(line: str) -> str:
    """Return a regular expression for a line: ``…`` in it matches any text; alone, any number of lines."""
    if line.strip() == "…":
        return r"(?:.*\n)*?"
    return ".*".join(re.escape(part) for part in line.split("…")) + r"\n"


def first_difference(expected: tuple[str, ...], printed: str, *, only_shape: bool = False) -> str | None:
    """Describe the first difference between a page's output and the printed one; None if there is none.

    Args:
        expected: lines of the page; a line ``…`` matches any number of lines.
        printed: complete output.
        only_shape: ignore figures.
    """
    reduce = shape if only_shape else str.rstrip
    actual = "".join(f"{reduce(line)}\n" for line in printed.rstrip().splitlines())
    lines = [_line_pattern(reduce(line)) for line in expected]
    if re.fullmatch("".join(lines), actual):
        return None
    fits = max(count for count in range(len(lines) + 1) if re.match("".join(lines[:count]), actual))
    if fits == len(lines):
        return f"more is printed below {expected[-1]!r}"
    before = re.match("".join(lines[:fits]), actual)
    assert before is not None
    return f"{expected[fits]!r} is not printed where the page shows it, but {actual[before.end() :][:300]!r}"


def source_with_helpers(path: Path, function: str) -> str:
    """Return the source of a test function and of what it uses in its file; empty if there is no such function."""
    text = path.read_text(encoding="utf-8")
    named: dict[str, ast.stmt] = {}
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            named[node.name] = node
        elif isinstance(node, ast.Assign):
            named |= {target.id: node for target in node.targets if isinstance(target, ast.Name)}
    found: dict[str, str] = {}
    waiting = [function]
    while waiting:
        name = waiting.pop()
        if name in found or name not in named:
            continue
        found[name] = ast.get_source_segment(text, named[name]) or ""
        waiting += [node.id for node in ast.walk(named[name]) if isinstance(node, ast.Name)]
    return "\n".join(found.values())


def links(page: Path) -> Iterator[str]:
    """Yield the targets of a page's links within the repository."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not re.match(r"[a-z]+:", target):
            yield target


def named_paths(page: Path) -> Iterator[str]:
    """Yield the files of the repository that a page names in code, such as ``planner/costs/workload.py``."""
    folders = "planner|models|distributed|reports|cli|tests|benchmarks|examples|scripts|docs"
    for code in re.findall(r"`([^`\n]+)`", page.read_text(encoding="utf-8")):
        yield from re.findall(rf"(?<![\w/.-])(?:{folders})/[\w/.-]*\.(?:py|md|yaml|sh|j2|css|js)\b", code)
