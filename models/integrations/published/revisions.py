"""Which table is which in a checkpoint of the authors' code: one of their commits exchanged queries and keys.

The keys and shapes are the same before and after. Networks whose queries and keys do not both have tables are newer.

Source: the history of github.com/hehefan/Translution up to 13730aa.
"""

from __future__ import annotations

import re
from enum import Enum

from translution.planner.common import InputError

_HISTORY = """
0ec589c 413df0c 30723ba d413803 ed2cf84 4d254d5 fe2969d 2f054fd 563c65f c17eba6 bdca444 27c4004 947aaaf 32f680d
004d32a 4a85661 81628f5 a826661 e56395e 5baf5e3 70c3614 9a7b500 acd5a20 67a5078 aed3c91 6fc3234 2e0a90e 2deff5a
dec1d37 9d2ff7b a6493cf a35b588 abdaa7c b0c2633 2613de0 65be3ff 2260c55 74f2765 c2e0667 8e879e8 9302253 ad3a589
0845c3e 4fb3d5c ef01c2b 393129f f322cbd 3c046ea f2737e0 4da70d5 dbb5d11 81f373b 7bbecec 2e2579b cb65e5b a58301f
8890e9d 2451fd7 1665d33 a20091e 5f94f85 168b44e 52a66dc 411bed8 c2bfeef e35f07d f0aee5c 3bd0d8b 6ef1d5b e384754
3493a9e c927c3f 00d48be fec5af2 71bdb53 7b34cb0 120b4d6 9e35da1 53be13a e012e9b 4702e03 fa63783 b06c316 d2886e8
75f7f59 13730aa
"""
COMMITS = tuple(_HISTORY.split())
"""Every commit, the oldest first."""


class Convention(Enum):
    """What a file's ``to_q`` and ``to_k`` hold."""

    NEW = "new"
    """``to_q`` the query tables of the equations, ``to_k`` the key tables."""
    OLD = "old"
    """The other way round."""
    OLDEST = "oldest"
    """As old, but all pairs use the first query matrix."""


_NEWER_FROM = {
    ("vit", False): "ef01c2b", ("vit", True): "3c046ea", ("gpt", False): "e35f07d", ("gpt", True): "5f94f85",
}  # fmt: skip
"""First commit with the new convention, by family and by whether the tables are low-rank."""
_BROKEN = {False: ("a826661", "6fc3234"), True: ("81628f5", "aed3c91")}
"""GPT's first commit that takes both factors of a logit from the key's token, and the first that no longer does."""
_OLD_ARCH = re.compile(r"a?lution_(vit|gpt)_")


def find_convention(family: str, *, low_rank: bool, arch: str | None, revision: str | None) -> Convention:
    """Return what ``to_q`` and ``to_k`` hold in a network in which both have tables.

    Args:
        family: "vit" or "gpt".
        low_rank: whether it is α-Translution.
        arch: name of the network in the authors' code, if the checkpoint has it.
        revision: the commit that trained it, or "old" or "new".

    Raises:
        InputError: if the two contradict each other or do not tell, or if the commit's network is no Translution.
    """
    by_revision = None if revision is None else _by_revision(family, low_rank, revision)
    if arch is None:
        if by_revision is None:
            raise InputError(
                "revision: is required: the file does not tell which table is the query's; must be old, new or the "
                f"commit that trained it (new from {_NEWER_FROM[family, low_rank]})"
            )
        return by_revision
    old = bool(_OLD_ARCH.match(arch))
    if by_revision is None and old and family == "gpt":
        raise InputError(
            f"revision: is required for arch {arch!r}, which has computed three different things: must be old (from "
            f"{_BROKEN[low_rank][1]}), or the commit that trained it"
        )
    if by_revision is None:
        return Convention.OLD if old else Convention.NEW
    if old == (by_revision is Convention.NEW):
        raise InputError(f"revision: {revision!r} is not allowed: arch {arch!r} is {'older' if old else 'newer'}")
    return by_revision


def _by_revision(family: str, low_rank: bool, revision: str) -> Convention:
    if revision in (Convention.OLD.value, Convention.NEW.value):
        return Convention(revision)
    place = _place(revision)
    if place >= COMMITS.index(_NEWER_FROM[family, low_rank]):
        return Convention.NEW
    if family == "vit":
        return Convention.OLD
    first, repaired = map(COMMITS.index, _BROKEN[low_rank])
    if place >= repaired:
        return Convention.OLD
    if place >= first:
        raise InputError(
            f"revision: {revision!r} is not allowed: this GPT takes queries and keys from the same token, which no "
            "Translution does"
        )
    return Convention.OLDEST


def _place(revision: str) -> int:
    found = [place for place, commit in enumerate(COMMITS) if revision[:7] == commit]
    if not found or not re.fullmatch(r"[0-9a-f]{7,40}", revision):
        raise InputError(
            f"revision: {revision[:60]!r} is not allowed: must be old, new or a commit of "
            f"github.com/hehefan/Translution up to {COMMITS[-1]}"
        )
    return found[0]
