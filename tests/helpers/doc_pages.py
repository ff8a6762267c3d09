"""What the pages have their reader type, what they say is printed, and whether that is what is printed."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = ("translution", "make", "python", "sbatch", "cd", "pip", "export", "sh", "tensorboard", "sudo", "apt-get")
"""What begins a command in an indented block; in a fence of ``sh`` or ``console`` every line is one."""
_UNIT = r"(?:[KMGTP]iB|[kMGTP]?FLOP|ms|s|B|k|M|G|T)"


def reader_pages() -> list[Path]:
    """The README and every page of docs that people wrote."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@dataclass(frozen=True)
class Shown:
    """One command of a page."""

    page: str
    line: int
    text: str
    output: tuple[str, ...] | None
    """The lines below it, if the page shows any."""

    def __str__(self) -> str:
        return f"{self.page}:{self.line}: {self.text}"

    @property
    def words(self) -> list[str]:
        """As a shell splits it, without variables set before it and without ``cd … &&``."""
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
        """The subcommand with its options' names, or another program with its first argument."""
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
    """The fenced blocks of a page, and its indented ones as those of language ``indented``."""
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
    """Lines with their numbers; one that ends in a backslash goes on in the next."""
    pending, first = "", 0
    for number, line in enumerate(fence.lines, fence.line):
        first = first if pending else number
        if line.endswith("\\"):
            pending += line[:-1]
            continue
        yield first, pending + (line.lstrip() if pending else line)
        pending = ""


def commands(page: Path) -> list[Shown]:
    """The commands of a page, in its order."""
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
    """Commands after a dollar sign, each with the lines below it."""
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
    """The Python blocks of a page."""
    return [fence for fence in fences(page.read_text(encoding="utf-8")) if fence.language == "python"]


def shape(line: str) -> str:
    """A line without its figures, and without what their width does to a table."""
    line = re.sub(r"[━─═]+", "─", line)
    line = re.sub(rf"-?\d+(?:,\d{{3}})*(?:\.\d+)?(?:e[-+]?\d+)?%?(?: ?{_UNIT}\b)?", "#", line)
    return re.sub(r"\s+", " ", line).strip()


def _line_pattern(line: str) -> str:
    """A line of a page as an expression: ``…`` in it is any text, and alone any lines."""
    if line.strip() == "…":
        return r"(?:.*\n)*?"
    return ".*".join(re.escape(part) for part in line.split("…")) + r"\n"


def first_difference(expected: tuple[str, ...], printed: str, *, only_shape: bool = False) -> str | None:
    """Where a page's output is not what was printed; None where it is.

    Args:
        expected: the page's lines; one that is ``…`` alone stands for any lines, or none.
        printed: the whole output.
        only_shape: compare all but the figures.
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
    return f"{expected[fits]!r} is not printed where it should be; there is {actual[before.end() :][:300]!r}"


def source_with_helpers(path: Path, function: str) -> str:
    """A test function with the functions and constants of its file that it uses, as text; empty if there is none."""
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
    """Targets of a page's links within the repository."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not re.match(r"[a-z]+:", target):
            yield target


def named_paths(page: Path) -> Iterator[str]:
    """Files and folders of the repository that a page names in code, such as ``planner/costs/workload.py``."""
    folders = "planner|models|distributed|reports|cli|tests|benchmarks|examples|scripts|docs"
    for code in re.findall(r"`([^`\n]+)`", page.read_text(encoding="utf-8")):
        yield from re.findall(rf"(?<![\w/.-])(?:{folders})/[\w/.-]*\.(?:py|md|yaml|sh|j2|css|js)\b", code)
