"""The source files of the library and the command line, by module name."""

from __future__ import annotations

from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]


@cache
def modules() -> dict[str, Path]:
    """Our modules by name; a package is its __init__.py."""
    paths = [*(ROOT / "minicpm_mlx").rglob("*.py"), *(ROOT / "cli").rglob("*.py")]
    found = {}
    for path in paths:
        parts = path.relative_to(ROOT).with_suffix("").parts
        if parts[0] == "cli":
            parts = ("minicpm_mlx", *parts)
        found[".".join(parts).removesuffix(".__init__")] = path
    return found
