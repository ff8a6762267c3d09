"""A release has one version, and the workflows on GitHub do what a person does."""

from __future__ import annotations

import re
import runpy
from pathlib import Path


def test_a_release_has_the_version_of_the_project_in_tag_and_changelog(root: Path, tmp_path: Path) -> None:
    find_problems = runpy.run_path(str(root / "scripts" / "check_release.py"))["find_problems"]
    (tmp_path / "pyproject.toml").write_text('[project]\nversion = "1.2.0"\n')
    changes = tmp_path / "CHANGELOG.md"
    changes.write_text("## [Unreleased]\n\n## [1.2.0] - 2027-01-31\n")
    assert find_problems("v1.2.0", tmp_path) == []
    assert find_problems("v1.2.1", tmp_path) == [
        "tag: v1.2.1 is not allowed: must be v1.2.0, the version in pyproject.toml"
    ]
    changes.write_text("## [Unreleased]\n")
    assert find_problems("v1.2.0", tmp_path) == ["CHANGELOG.md: has no heading '## [1.2.0] - YYYY-MM-DD'"]


def test_workflows_call_targets_that_the_makefile_has(root: Path) -> None:
    targets = set(re.findall(r"^([\w-]+):", (root / "Makefile").read_text(), re.MULTILINE))
    called = set()
    for path in sorted((root / ".github" / "workflows").glob("*.yml")):
        called |= set(re.findall(r"run: make ([\w-]+)", path.read_text()))
    assert {"check", "test", "docs", "dist"} <= called <= targets
