"""docs/architecture.md names functions and classes that exist."""

from __future__ import annotations

import ast
import re

from support.source import ROOT, modules

PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")


def defined() -> set[str]:
    """Every function, class and method of the library and the command line."""
    names = set()
    for path in modules().values():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                bodies = [
                    item
                    for item in node.body
                    if isinstance(item, ast.FunctionDef | ast.AsyncFunctionDef)
                ]
                names |= {node.name, *(f"{node.name}.{item.name}" for item in bodies)}
            elif isinstance(
                node, ast.FunctionDef | ast.AsyncFunctionDef | ast.AnnAssign | ast.Assign
            ):
                targets = node.targets if isinstance(node, ast.Assign) else [node]
                names |= {
                    getattr(t, "name", getattr(getattr(t, "target", t), "id", "")) for t in targets
                }
    return names


def test_every_arrow_names_a_function_that_exists() -> None:
    arrows = re.findall(r'-->\|"([^"]+)"\|', PAGE)
    named = {name for arrow in arrows for name in re.split(r", | or ", arrow)}
    assert named
    assert not named - defined()


def test_every_file_named_exists() -> None:
    named = set(re.findall(r"`((?:\w+/)*\w+\.py)`", PAGE))
    assert named
    for name in named:
        assert (ROOT / "minicpm_mlx" / name).exists() or (ROOT / name).exists(), name
