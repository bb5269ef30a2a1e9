"""What the layout promises: the public names, and imports that point one way."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import minicpm_mlx as mm

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "minicpm_mlx"

ROWS = [
    {"errors", "arguments", "atomic", "config", "config_parts"},
    {
        "rope",
        "activation",
        "exponentials",
        "tokenizer",
        "tokenizer_files",
        "template",
        "registry",
        "hub",
        "device",
        "distributed",
        "launch",
        "ranks",
        "voices",
        "stops",
        "schema",
        "lark",
    },
    {"moe", "model", "fuse", "quantize", "onerow", "gptq", "repack", "sharding"},
    {"weights", "engine", "reply"},
    {"memory", "perplexity", "companions", "batched"},
    {"quantization"},
    {"adapt", "demo", "local", "convert", "export", "structured"},
    {"lm"},
    {"loading"},
    {"chat", "auto", "doctor", "identity"},
    {"sessions", "bench", "merge", "train", "evals"},
    {"server"},
    {"web"},
]
"""A module imports from its own row and the rows above; cli/ is below them all."""

LEVEL = {name: level for level, row in enumerate(ROWS) for name in row}


def modules() -> list[tuple[str, Path]]:
    return [
        (path.relative_to(PACKAGE).parts[0].removesuffix(".py"), path)
        for path in sorted(PACKAGE.rglob("*.py"))
        if path != PACKAGE / "__init__.py"
    ]


def imports(path: Path) -> set[str]:
    """Names of our modules that a file imports, at any depth of it."""
    depth = len(path.relative_to(PACKAGE).parts)
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            if node.level == depth:
                names = [node.module] if node.module else [alias.name for alias in node.names]
                found |= {str(name).split(".")[0] for name in names}
            elif (node.module or "").startswith("minicpm_mlx"):
                found.add((node.module or "").split(".")[1])
    return found - {"__version__"}


def outside(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(str(node.module).split(".")[0])
    return found


@pytest.mark.parametrize(("name", "path"), modules(), ids=lambda v: getattr(v, "stem", v))
def test_imports_point_one_way(name: str, path: Path) -> None:
    wrong = {other for other in imports(path) if LEVEL[other] > LEVEL[name]}
    assert not wrong, f"{path.name} imports {wrong} from a row below its own"


def test_engine_knows_nothing_of_text_or_files() -> None:
    for path in (PACKAGE / "engine").glob("*.py"):
        assert not imports(path) & {"tokenizer", "template", "hub", "weights"}


@pytest.mark.parametrize(
    ("library", "doors"),
    [
        ("rich", {"theme.py", "manage.py", "markdown.py", "block.py", "training.py"}),
        ("prompt_toolkit", {"prompt.py"}),
        ("huggingface_hub", {"hub.py"}),
        ("jinja2", {"template.py"}),
        ("gguf", {"library.py"}),
        ("safetensors", {"safetensors.py"}),
        ("transformers", set()),
        ("torch", set()),
        ("pickle", set()),
    ],
)
def test_each_library_has_its_door(library: str, doors: set[str]) -> None:
    files = [*PACKAGE.rglob("*.py"), *(ROOT / "cli").glob("*.py")]
    assert {path.name for path in files if library in outside(path)} <= doors


@pytest.mark.parametrize(
    ("library", "door"),
    [
        ("fastapi", "minicpm_mlx/server"),
        ("h11", "minicpm_mlx/server"),
        ("prometheus_client", "minicpm_mlx/server"),
        ("pydantic", "minicpm_mlx/server"),
        ("starlette", "minicpm_mlx/server"),
        ("uvicorn", "minicpm_mlx/server"),
        ("gradio", "minicpm_mlx/web"),
        ("llguidance", "minicpm_mlx/structured.py"),
    ],
)
def test_libraries_of_the_server_have_their_folder(library: str, door: str) -> None:
    for path in [*PACKAGE.rglob("*.py"), *(ROOT / "cli").glob("*.py")]:
        if library in outside(path):
            assert path.relative_to(ROOT).as_posix().startswith(door)


def test_public_names_are_sorted_and_all_there() -> None:
    assert mm.__all__ == sorted(mm.__all__, key=lambda n: (not n.isupper(), n.islower(), n))
    for name in mm.__all__:
        assert getattr(mm, name) is not None


def test_public_names_are_documented() -> None:
    assert not [name for name in mm.__all__ if not getattr(mm, name).__doc__]


def test_files_stay_short() -> None:
    long = {
        path.name: lines
        for path in [*PACKAGE.rglob("*.py"), *(ROOT / "cli").glob("*.py")]
        if (lines := len(path.read_text(encoding="utf-8").splitlines())) > 420
    }
    assert not long, f"split these: {long}"


def test_styles_are_the_themes() -> None:
    from minicpm_mlx.cli.render.theme import STYLES

    for path in (ROOT / "cli").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.keyword) and node.arg == "style":
                literal = isinstance(node.value, ast.Constant) and node.value.value
                assert not literal or literal in STYLES, f"{path.name}: {literal}"
