"""What the pages name exists, what they show parses, and every public name has a docstring."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest
import typer
from helpers.doc_pages import (
    ROOT,
    Shown,
    commands,
    fences,
    first_difference,
    links,
    named_paths,
    reader_pages,
    shape,
    source_with_helpers,
)

from translution.cli.main import full_app

PAGES = [*reader_pages(), ROOT / "CONTRIBUTING.md"]


def names(paths: list[Path]) -> list[str]:
    return [str(path.relative_to(ROOT)) for path in paths]


@pytest.fixture(scope="module")
def reference() -> ModuleType:
    spec = importlib.util.spec_from_file_location("api_pages", ROOT / "scripts" / "api_pages.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_public_name_has_a_docstring(reference: ModuleType) -> None:
    assert reference.undocumented() == []


def test_a_public_name_without_a_docstring_is_found(tmp_path: Path, reference: ModuleType) -> None:
    package = tmp_path / "models" / "layers"
    package.mkdir(parents=True)
    (package.parent / "__init__.py").write_text('"""Models."""\n')
    (package / "__init__.py").write_text("")
    (package / "layer.py").write_text(
        '"""A layer."""\n'
        "class Layer:\n"
        '    """A layer."""\n'
        "    def forward(self): ...\n"
        "    @property\n"
        "    def width(self): ...\n"
        "    def _own(self): ...\n"
        "def build(): ...\n"
    )
    assert sorted(reference.undocumented(tmp_path)) == [
        "models.layers",
        "models.layers.layer.Layer.forward",
        "models.layers.layer.Layer.width",
        "models.layers.layer.build",
    ]


@pytest.mark.parametrize("page", names(PAGES))
def test_what_a_page_names_exists(page: str) -> None:
    path = ROOT / page
    headings: dict[Path, set[str]] = {}
    for target in links(path):
        file, _, anchor = target.partition("#")
        found = (path.parent / file).resolve() if file else path
        if file.startswith("api/"):  # built with the site, and looked for in it (test_site.py)
            continue
        assert found.exists(), f"{page}: {target}"
        if anchor:
            known = headings.setdefault(found, anchors(found))
            assert anchor in known, f"{page}: {target}"
    for name in named_paths(path):
        assert (ROOT / name).exists(), f"{page}: {name}"


def anchors(page: Path) -> set[str]:
    """The names that GitHub gives to a page's headings."""
    found = set()
    for heading in re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE):
        text = re.sub(r"[^\w\- ]", "", heading.lower())
        found.add(text.replace(" ", "-"))
    return found


def test_the_index_names_every_page() -> None:
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    for path in sorted((ROOT / "docs").rglob("*.md")):
        if path.name != "README.md":
            assert f"]({path.relative_to(ROOT / 'docs')})" in index, path


def test_every_command_of_the_pages_is_one_that_the_program_takes() -> None:
    program = typer.main.get_command(full_app())
    taken = set()
    for shown in (shown for page in reader_pages() for shown in commands(page)):
        if shown.words[0] != "translution":
            continue
        name, arguments = shown.words[1], shown.words[2:]
        command = program.get_command(None, name)
        assert command is not None, shown
        command.make_context(name, [*arguments])  # Reads every option; runs nothing.
        taken.add(name)
    visible = {name for name, command in program.commands.items() if not command.hidden}
    assert taken == visible, "each command has its place in a page"


def test_every_command_has_a_section_of_the_page_on_commands() -> None:
    program = typer.main.get_command(full_app())
    text = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
    sections = re.split(r"^## ", text, flags=re.MULTILINE)[1:]
    visible = {name for name, command in program.commands.items() if not command.hidden}
    assert visible <= {section.split("\n")[0] for section in sections}
    for section in sections:
        name, _, body = section.partition("\n")
        if name in visible:
            assert re.search(rf"^\$ translution {name}\b", body, flags=re.MULTILINE) or name == "serve", name
    for option in set(re.findall(r"`(--[\w-]+)", text)) - {"--help"}:
        known = {known for command in program.commands.values() for p in command.params for known in p.opts}
        assert option in known | {f"--no-{known[2:]}" for known in known}, option


def test_the_page_on_extending_names_what_a_new_operator_touches() -> None:
    section = section_of("A new operator")
    for folder in ("planner", "models", "distributed", "reports", "cli", "benchmarks"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            if "shaw" in path.read_text(encoding="utf-8").lower():
                assert f"`{path.relative_to(ROOT)}`" in section, path


def test_the_page_on_extending_names_what_knows_the_engine() -> None:
    section = section_of("A new engine")
    for folder in ("planner", "distributed"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            if re.search(r"^\s*(?:import deepspeed|from deepspeed)\b", path.read_text(), flags=re.MULTILINE):
                assert f"`{path.relative_to(ROOT)}`" in section, path


def test_the_page_on_architecture_names_where_facts_about_deepspeed_are() -> None:
    section = section_of("Facts about DeepSpeed", "architecture.md")
    for folder in ("planner", "distributed"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            if "0.19.8" in path.read_text(encoding="utf-8"):
                assert f"`{path.relative_to(ROOT)}`" in section, path


def test_the_names_that_the_page_on_architecture_points_to_are_in_their_files() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    pointed = re.findall(r"`([\w/]+\.py)` \((`[\w.]+`(?:, `[\w.]+`)*)\)", text)
    assert len(pointed) >= 5
    for path, names_shown in pointed:
        source = (ROOT / path).read_text(encoding="utf-8")
        for name in re.findall(r"\w+", names_shown):
            assert re.search(rf"\b(?:class|def) {name}\b|^{name}\b", source, flags=re.MULTILINE), f"{path}: {name}"


def test_the_architecture_page_answers_fifteen_questions() -> None:
    section = section_of("I want to change", "architecture.md")
    assert len(re.findall(r"^\| (?!I want|---)", section, flags=re.MULTILINE)) == 15


def test_the_classes_of_the_glossary_exist() -> None:
    named = set(re.findall(r"`([A-Z]\w*[a-z]\w*)`", section_of("Glossary", "architecture.md")))
    sources = "\n".join(
        path.read_text(encoding="utf-8") for top in ("planner", "models", "distributed") for path in (ROOT / top).rglob("*.py")
    )
    assert len(named) >= 20
    assert named <= set(re.findall(r"^class (\w+)", sources, flags=re.MULTILINE))


def section_of(heading: str, page: str = "extending.md") -> str:
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    return next(part for part in re.split(r"^## ", text, flags=re.MULTILINE) if part.startswith(heading))


def test_no_page_names_a_folder_of_the_machine_that_made_it() -> None:
    for path in PAGES:
        text = re.sub(r"(?:/tmp/torch_extensions|/tmp/translution-measure-\S*)", "", path.read_text(encoding="utf-8"))
        assert not re.search(r"/(?:tmp|work|root|home)/\w", text), path


PAGE = """# Page

```sh
translution estimate a --json  # why
NAME=x translution launch \\
    plans/a
```

    translution status runs/001
    some output

```console
$ translution clusters
one 1.5 GiB
…
$ cd plans && sbatch job.sbatch run
```
"""


def test_commands_are_read_as_a_shell_reads_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("helpers.doc_pages.ROOT", tmp_path)
    (tmp_path / "page.md").write_text(PAGE)
    found = commands(tmp_path / "page.md")
    assert [shown.kind for shown in found] == ["estimate --json", "launch", "status", "clusters", "sbatch job.sbatch"]
    assert [shown.line for shown in found] == [4, 5, 9, 13, 16]
    assert found[1].words == ["translution", "launch", "plans/a"]
    assert found[3].output == ("one 1.5 GiB", "…")
    assert found[4].output is None
    assert [fence.language for fence in fences(PAGE)] == ["sh", "indented", "console"]


@pytest.mark.parametrize(
    ("expected", "printed", "same"),
    [
        (("a", "b"), "a\nb\n", True),
        (("a", "…"), "a\nb\nc\n", True),
        (("…", "c"), "a\nb\nc\n", True),
        (("a", "…", "c"), "a\nc", True),
        (("a …", "b"), "a 12\nb\n", True),
        (("a",), "a\nb\n", False),
        (("a", "c"), "a\nb\nc\n", False),
        (("…", "d"), "a\nb\n", False),
        (("a 1",), "a 2", False),
    ],
)
def test_a_line_of_dots_stands_for_any_lines(expected: tuple[str, ...], printed: str, same: bool) -> None:
    assert (first_difference(expected, printed) is None) == same


def test_a_shape_is_all_but_the_figures() -> None:
    assert shape("│ nccl   │ 1.5 GiB │") == shape("│ nccl │  12.25 MiB │")
    assert shape("step 1/20: loss 2.3, 31 samples/s") == shape("step 20/20: loss 1e-05, 1,143 samples/s")
    assert shape("│ nccl │ 1.5 GiB │") != shape("│ gloo │ 1.5 GiB │")
    assert first_difference(("loss 2.3",), "loss 0.1", only_shape=True) is None


def test_helpers_of_a_test_are_found(tmp_path: Path) -> None:
    file = tmp_path / "t.py"
    file.write_text("A = 'launch'\ndef go():\n    return A\ndef test_x():\n    go()\ndef other():\n    return 'no'\n")
    source = source_with_helpers(file, "test_x")
    assert "launch" in source and "no" not in source
    assert source_with_helpers(file, "test_y") == ""
    assert Shown("p", 1, "translution a --b=1", None).options == ["--b"]
