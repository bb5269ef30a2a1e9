"""Settings merged into what a file has, as data; each format edits its text to match."""

from __future__ import annotations

from typing import Any

NAMES = ("id", "name", "model_id")
"""Fields that tell the items of a list apart."""


def merge(old: Any, new: Any) -> Any:
    """`old` with the settings of `new`: mappings by key, items of lists by name, the rest new."""
    if isinstance(old, dict) and isinstance(new, dict):
        added = {key: value for key, value in new.items() if key not in old}
        return {k: merge(v, new[k]) if k in new else v for k, v in old.items()} | added
    if isinstance(old, list) and isinstance(new, list):
        merged = list(old)
        for item in new:
            at = place_of(item, merged)
            if at is None:
                merged.append(item)
            else:
                merged[at] = merge(merged[at], item)
        return merged
    return new


def place_of(item: Any, items: list[Any]) -> int | None:
    """Index of the item with the same name, or of an equal one; None if there is none."""
    name = next((name for name in NAMES if isinstance(item, dict) and name in item), None)
    if name is None:
        return items.index(item) if item in items else None
    for at, other in enumerate(items):
        if isinstance(other, dict) and other.get(name) == item[name]:
            return at
    return None
