"""What is random in tests: `make test` has one seed and few examples, `make fuzz` a new seed and many."""

from __future__ import annotations

import os

from hypothesis import settings

_SEED = os.environ.get("TRANSLUTION_FUZZ_SEED")
_MORE = 20
"""How many times as many examples `make fuzz` tries."""


def fuzzing() -> bool:
    """Return whether this is `make fuzz`."""
    return _SEED is not None


def seed(usual: int) -> int:
    """Return the seed of this session."""
    return usual if _SEED is None else int(_SEED)


def repeats(usual: int) -> int:
    """Return how often to try."""
    return usual * (_MORE if fuzzing() else 1)


def examples(usual: int) -> settings:
    """Return Hypothesis' settings for a test that usually tries `usual` examples."""
    return settings(max_examples=repeats(usual))


def load_profile() -> None:
    """Choose Hypothesis' profile. Examples have no deadline: on a busy machine a correct one may be slow."""
    settings.register_profile("test", deadline=None, derandomize=True)
    settings.register_profile("fuzz", deadline=None, print_blob=True, max_examples=repeats(100))
    settings.load_profile("fuzz" if fuzzing() else "test")
