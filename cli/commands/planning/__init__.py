"""Commands that answer before anything runs, and show what they or a run found."""

from __future__ import annotations

__all__: list[str] = []
