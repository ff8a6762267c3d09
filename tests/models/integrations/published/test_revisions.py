"""Which table is which, by the commit of the authors' code."""

from __future__ import annotations

import pytest

from translution.models.integrations.published.revisions import COMMITS, Convention, find_convention
from translution.planner.common.errors import InputError


def test_every_commit_is_known_once() -> None:
    assert len(COMMITS) == len(set(COMMITS)) == 86
    assert {len(commit) for commit in COMMITS} == {7}


@pytest.mark.parametrize(
    ("family", "low_rank", "revision", "convention"),
    [
        ("vit", False, "d413803", Convention.OLD),
        ("vit", False, "4fb3d5c", Convention.OLD),
        ("vit", False, "ef01c2b", Convention.NEW),
        ("vit", True, "ef01c2b", Convention.OLD),
        ("vit", True, "4da70d5", Convention.NEW),
        ("gpt", False, "004d32a", Convention.OLDEST),
        ("gpt", False, "6fc3234", Convention.OLD),
        ("gpt", False, "c2bfeef", Convention.OLD),
        ("gpt", False, "e35f07d", Convention.NEW),
        ("gpt", True, "4a85661", Convention.OLDEST),
        ("gpt", True, "aed3c91", Convention.OLD),
        ("gpt", True, "5f94f85", Convention.NEW),
        ("gpt", True, "13730aa", Convention.NEW),
        ("gpt", True, "13730aa0" + 32 * "f", Convention.NEW),
        ("gpt", False, "old", Convention.OLD),
        ("vit", False, "new", Convention.NEW),
    ],
)
def test_the_commit_tells(family: str, low_rank: bool, revision: str, convention: Convention) -> None:
    assert find_convention(family, low_rank=low_rank, arch=None, revision=revision) is convention


def test_the_name_of_a_preset_tells_unless_it_has_meant_several_things() -> None:
    assert find_convention("vit", low_rank=False, arch="lution_vit_tiny", revision=None) is Convention.OLD
    assert find_convention("vit", low_rank=True, arch="alution_vit_base", revision=None) is Convention.OLD
    for arch in ("qkvlution_vit_tiny", "qkv_base", "lor_qkv_large"):
        assert find_convention("vit", low_rank=False, arch=arch, revision=None) is Convention.NEW
    with pytest.raises(InputError, match="revision: is required for arch 'lution_gpt_tiny'"):
        find_convention("gpt", low_rank=False, arch="lution_gpt_tiny", revision=None)
    assert find_convention("gpt", low_rank=False, arch="lution_gpt_tiny", revision="004d32a") is Convention.OLDEST
    with pytest.raises(InputError, match="revision: 'old' is not allowed: arch 'qkv_tiny' is newer"):
        find_convention("gpt", low_rank=False, arch="qkv_tiny", revision="old")
    with pytest.raises(InputError, match="revision: 'new' is not allowed: arch 'lution_vit_tiny' is older"):
        find_convention("vit", low_rank=False, arch="lution_vit_tiny", revision="new")


@pytest.mark.parametrize(("low_rank", "revision"), [(False, "a826661"), (True, "81628f5"), (False, "9a7b500")])
def test_a_gpt_that_is_no_translution_is_refused(low_rank: bool, revision: str) -> None:
    with pytest.raises(InputError, match="takes queries and keys from the same token"):
        find_convention("gpt", low_rank=low_rank, arch=None, revision=revision)


@pytest.mark.parametrize("revision", ["", "13730a", "zzzzzzz", "13730aa\n", "Old"])
def test_an_unknown_revision_is_refused(revision: str) -> None:
    with pytest.raises(InputError, match="is not allowed: must be old, new or a commit"):
        find_convention("vit", low_rank=False, arch=None, revision=revision)
