"""MkDocs hooks: lay the site out like the repository, and make the API reference's pages.

MkDocs reads one folder, docs/. These hooks add what its pages link to elsewhere in the repository (README.md,
reports/, examples/) under the same paths, so that every relative link works on GitHub and in the site.
"""

from __future__ import annotations

import posixpath
import re
import sys
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))
import api_pages  # noqa: E402 -- MkDocs runs hooks by path, without their folder in sys.path


def on_startup(**_: object) -> None:
    """Link the packages under their installed names, before mkdocstrings looks for the folder of links."""
    api_pages.link_packages(ROOT / "build" / "packages")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Add the API reference to the navigation."""
    assert config.nav is not None
    config.nav.append({"API reference": api_pages.navigation()})
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Give the files of docs/ their path in the repository; add the reference and every file that pages link to."""
    for name, text in api_pages.pages().items():
        files.append(File.generated(config, name, content=text))
    for file in list(files):
        if file.src_dir == config.docs_dir:
            files.remove(file)
            path = f"docs/{file.src_uri}"
            files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
    waiting = ["README.md", *(page.src_uri for page in files.documentation_pages())]
    while waiting:
        path = waiting.pop()
        if files.get_file_from_path(path) is None:
            files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
        if path.endswith(".md") and (ROOT / path).exists():
            waiting += [target for target in _targets(path) if files.get_file_from_path(target) is None]
    return files


def _targets(page: str) -> list[str]:
    """Return the files of the repository that a page links to, as paths from its root."""
    text = re.sub(r"```.*?```", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.DOTALL)
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text)]
    paths = [posixpath.normpath(posixpath.join(posixpath.dirname(page), link)) for link in links if link]
    return [path for path in dict.fromkeys(paths) if (ROOT / path).is_file()]
