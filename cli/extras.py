"""Optional packages: an import that fails becomes a one-line error which names the extra to install."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from translution.planner.common import MissingPackageError


@contextmanager
def requires_extra(extra: str) -> Iterator[None]:
    """Import inside this context what needs the packages of an extra.

    Args:
        extra: an extra of this distribution, such as "report".

    Raises:
        MissingPackageError: if a package is missing.
    """
    try:
        yield
    except ImportError as error:
        raise MissingPackageError(f"{error.name} is missing: pip install 'translution-scale[{extra}]'") from None
