"""Bytes for people."""

from __future__ import annotations


def unit_of(size: float) -> tuple[str, float]:
    """A unit in which so many bytes are not next to nothing, and the bytes it has."""
    return ("GB", 1e9) if size >= 1e8 else ("MB", 1e6)
