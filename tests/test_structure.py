"""What the layout promises: rows of packages, no circles, short files, one meaning a class name."""

from __future__ import annotations

import ast
from collections import Counter, defaultdict
from collections.abc import Iterator
from functools import cache

import pytest

import minicpm_mlx as mm
from support.source import ROOT, modules

ROWS = [
    {"errors"},
    {"arguments", "device", "model_cards", "files"},
    {"text", "distributed"},
    {"model"},
    {"memory", "weights"},
    {"engine"},
    {"quantization", "lm"},
    {"loading"},
    {"train"},
    {"convert", "doctor"},
    {"evals", "bench", "server", "clients"},
    {"verify"},
    {"cli"},
]
"""A package imports from its own and from rows above it, never from its neighbours in a row; but
`device`, `model_cards` and `files` may use `arguments`."""

LEVEL = {name: level for level, row in enumerate(ROWS) for name in row}
LOOSE = 7
"""Modules at the top of the library, at most."""
FOLDER = 14
"""Files of code in a folder, at most."""
LINES = 420
"""Lines of a file, at most."""
SHARED_NAMES: dict[str, str] = {}
"""Class names with two meanings, and why."""

DOORS = {
    "rich": "minicpm_mlx.cli",
    "prompt_toolkit": "minicpm_mlx.cli.chat.input",
    "huggingface_hub": "minicpm_mlx.loading.download",
    "jinja2": "minicpm_mlx.text.chat_template",
    "gguf": "minicpm_mlx.weights.gguf.package",
    **dict.fromkeys(("mcp", "httpx2"), "minicpm_mlx.cli.chat.mcp"),
    "safetensors": "minicpm_mlx.weights.safetensors",
    "llguidance": "minicpm_mlx.lm.structured",
    "gradio": "minicpm_mlx.server.web",
    "tomlkit": "minicpm_mlx.clients.toml",
    "yaml": "minicpm_mlx.clients.yaml",
    **dict.fromkeys(
        ("fastapi", "h11", "prometheus_client", "pydantic", "starlette", "uvicorn"),
        "minicpm_mlx.server",
    ),
}
"""The package or module that alone imports a library."""
NEVER = {"pickle", "torch", "transformers"}


@cache
def tree(name: str) -> ast.Module:
    return ast.parse(modules()[name].read_text(encoding="utf-8"))


def imported(name: str) -> Iterator[str]:
    """Absolute names of all that a module imports, at any depth of it."""
    package = name if modules()[name].name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                yield f"{base}.{alias.name}" if f"{base}.{alias.name}" in modules() else base


def ours(name: str) -> set[str]:
    """Our modules that a module imports; the public face of the library is none."""
    return {other for other in imported(name) if other in modules()} - {name, "minicpm_mlx"}


def test_imports_point_down_the_rows() -> None:
    wrong = []
    for name in modules():
        if name == "minicpm_mlx":
            continue
        home = name.split(".")[1]
        for other in ours(name):
            target = other.split(".")[1]
            below = LEVEL[target] < LEVEL[home] or target in (home, "arguments")
            if not below and (home, target) != ("cli", "models"):
                wrong.append(f"{name} imports {other}")
    assert not wrong


def test_no_files_import_each_other_in_a_circle() -> None:
    graph = {name: ours(name) for name in modules()}
    while leaves := [name for name, targets in graph.items() if not targets & graph.keys()]:
        for name in leaves:
            del graph[name]
    assert not graph, f"in a circle, or above one: {sorted(graph)}"


def test_engine_knows_nothing_of_text_or_files() -> None:
    for name in modules():
        if name.startswith("minicpm_mlx.engine"):
            assert not {other.split(".")[1] for other in ours(name)} & {
                "text",
                "weights",
                "loading",
            }


def test_each_library_has_one_door() -> None:
    for name in modules():
        for library in {other.split(".")[0] for other in imported(name)}:
            assert library not in NEVER, f"{name} imports {library}"
            door = DOORS.get(library)
            assert door is None or f"{name}.".startswith(f"{door}."), f"{name} imports {library}"


def test_few_modules_lie_loose_and_folders_stay_small() -> None:
    files = Counter(path.parent for path in modules().values() if path.name != "__init__.py")
    assert files[ROOT / "minicpm_mlx"] <= LOOSE
    assert not {str(folder): count for folder, count in files.items() if count > FOLDER}


def test_files_stay_short() -> None:
    sizes = {name: len(path.read_text().splitlines()) for name, path in modules().items()}
    assert not {name: size for name, size in sizes.items() if size > LINES}


def test_a_class_name_has_one_meaning() -> None:
    homes = defaultdict(list)
    for name in modules():
        for node in ast.walk(tree(name)):
            if isinstance(node, ast.ClassDef):
                homes[node.name].append(name)
    shared = {name: places for name, places in homes.items() if len(places) > 1}
    assert shared.keys() == SHARED_NAMES.keys(), shared
    assert len(SHARED_NAMES) <= 5


def test_every_package_says_what_lives_in_it() -> None:
    for name, path in modules().items():
        assert path.name != "__init__.py" or ast.get_docstring(tree(name)), name


def test_functions_of_the_command_line_stay_short() -> None:
    long = {
        f"{name}.{node.name}": length
        for name in modules()
        if name.startswith("minicpm_mlx.cli")
        for node in ast.walk(tree(name))
        if isinstance(node, ast.FunctionDef)
        and (length := (node.end_lineno or 0) - node.lineno + 1) > 60
    }
    assert not long


def test_docstrings_say_what_code_does() -> None:
    riddles = [
        f"{name}:{getattr(node, 'lineno', 1)}"
        for name in modules()
        for node in ast.walk(tree(name))
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        and (ast.get_docstring(node) or "").startswith("What")
    ]
    assert len(riddles) <= 20, riddles


def test_public_names_are_sorted_and_documented() -> None:
    assert mm.__all__ == sorted(mm.__all__, key=lambda n: (not n.isupper(), n.islower(), n))
    for name in mm.__all__:
        assert getattr(mm, name).__doc__, name


def test_styles_are_the_themes() -> None:
    pytest.importorskip("rich")
    from minicpm_mlx.cli.render.theme import STYLES

    for name in modules():
        for node in ast.walk(tree(name)) if name.startswith("minicpm_mlx.cli") else ():
            if isinstance(node, ast.keyword) and node.arg == "style":
                literal = isinstance(node.value, ast.Constant) and node.value.value
                assert not literal or literal in STYLES, f"{name}: {literal}"
