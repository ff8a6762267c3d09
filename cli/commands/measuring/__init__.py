"""Commands that measure this machine or a plan, and compare with the prediction."""

from __future__ import annotations

__all__: list[str] = []
