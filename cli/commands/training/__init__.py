"""Commands that prepare, start, follow and export a run; `ranks` holds the hidden commands of its processes."""

from __future__ import annotations

__all__: list[str] = []
