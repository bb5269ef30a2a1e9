"""The guides' commands parse; the options, routes, fields and names they use exist."""

from __future__ import annotations

import plistlib
import re
import runpy
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from support.guides import DOCS, blocks, commands, options, parsed, rows, spans, text

if TYPE_CHECKING:
    from support.serving import Live

PAIRS = [
    (f"{stem}.md", f"{stem}_zh.md")
    for stem in (
        "architecture",
        "clients",
        "evaluation",
        "finetuning",
        "formats",
        "server",
        "speed",
        "verify",
    )
    if (DOCS / f"{stem}_zh.md").exists()
]
GUIDES = [name for pair in PAIRS for name in pair]


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: pair[0])
def test_both_languages_give_the_same_commands_code_and_tables(pair: tuple[str, str]) -> None:
    english, chinese = pair
    assert commands(english) == commands(chinese)
    for language in ("python", "js", "sh", "yaml", "json", "xml"):
        assert blocks(language, english) == blocks(language, chinese), language
    shapes = [
        [line.count(" | ") for line in text(name).splitlines() if line.startswith("| ")]
        for name in pair
    ]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("name", ["finetuning.md", "finetuning_zh.md"])
def test_what_a_mac_trains_is_what_the_planner_says(name: str) -> None:
    folder = DOCS.parent / "benchmarks"
    script = runpy.run_path(str(folder / "training_plans.py"))
    for table in script["tables"]():
        assert table in text(name)


@pytest.mark.parametrize("name", [english for english, _ in PAIRS])
def test_commands_parse_and_name_tasks_and_models_that_exist(name: str) -> None:
    import minicpm_mlx as mm
    from minicpm_mlx.evals.tasks import TASKS

    given = [arguments for arguments in commands(name) if "--help" not in arguments]
    assert len(given) > {"clients.md": 4, "speed.md": 4, "verify.md": 3}.get(name, 8)
    for arguments in given:
        for parameters in parsed(arguments):
            if arguments[0] == "eval" and "tasks" in parameters and not parameters.get("harness"):
                assert {*parameters["tasks"].split(",")} <= {*TASKS, "all"}
                assert parameters["model"] in {None, *mm.cards()}


@pytest.mark.parametrize("name", GUIDES)
def test_every_option_named_in_a_guide_exists(name: str) -> None:
    # In some tables of the server's guide the first column is another program's.
    lines = [re.sub(r"^\| `-.*? \| ", "| ", line) for line in text(name).splitlines()]
    words = [word for span in spans("\n".join(lines)) for word in span.split()]
    named = {re.split("[=/,]", word)[0] for word in words if re.match("--[a-z]", word)}
    short = {"formats": 1, "clients": 5, "speed": 0, "verify": 0}
    assert len(named) > short.get(re.split("[_.]", name)[0], 12)
    assert named - options() <= {
        *("--lora", "--settings", "--tools"),  # llama.cpp's and Claude Code's own
        "--help",
    }


@pytest.mark.parametrize(
    ("name", "words"), [("clients.md", ("yes", "–")), ("clients_zh.md", ("是", "–"))]
)
def test_the_list_of_libraries_is_that_of_their_test(name: str, words: tuple[str, str]) -> None:
    from support.client_libraries import LIBRARIES, THOUGHTS, TOOLS

    yes, none = words
    shown = {row[0]: row[1:4] for row in rows(name, r".+?") if len(row) == 5}
    for library in LIBRARIES:
        version, *marks = shown.pop(library.name)
        assert version == library.version
        for mark, checks in zip(marks, (THOUGHTS, TOOLS), strict=True):
            works = not {*checks} & library.cannot.keys()
            there = {*checks} <= {*library.checks}
            assert (mark == yes) == (works and there), library.name
            assert (mark == none) == (not there), library.name
    assert len(shown) == 1, shown.keys()  # the head


@pytest.mark.parametrize("name", GUIDES)
def test_links_within_the_guides_lead_somewhere(name: str) -> None:
    for file, heading in re.findall(r"\]\(([\w./]*)(?:#([^)]+))?\)", text(name)):
        path = DOCS / (file or name)
        assert path.exists()
        headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
        anchors = {re.sub(r"[^\w\- ]", "", line.lower()).replace(" ", "-") for line in headings}
        assert not heading or heading in anchors, (file, heading)


def test_the_table_of_sets_is_the_librarys() -> None:
    from minicpm_mlx.evals.tasks import TASKS

    shown = {row[0].strip("`"): row[2] for row in rows("evaluation.md", r"`\w+`")}
    assert shown == {name: ", ".join(task.modes) for name, task in TASKS.items()}


def test_routes_fields_and_metrics_named_are_the_servers(tiny_server: Live) -> None:
    document = tiny_server.ask("GET", "/openapi.json").json
    served = text("server.md").partition("## What is served")[2].partition("## Clients")[0]
    routes = {span.partition(" ")[0] for span in spans(served) if re.match(r"/[a-z]", span)}
    there = {*document["paths"]}
    assert len(routes) > 20
    assert routes - {"/no_think"} <= there, "which is a word for models that think"
    assert {path for path in there - routes if "/blobs/" not in path} <= {"/api/push", "/api/copy"}
    fields = {
        field
        for shape in document["components"]["schemas"].values()
        for field in shape.get("properties", ())
    }
    api = r"(?:OpenAI, \w+|Anthropic|Ollama|SGLang)"
    named = {
        span
        for row in rows("server.md", api)
        if not row[1].startswith("`http")
        for span in spans(" ".join(row[1:]))
        if not span.startswith("/")
    }
    assert len(named) > 40
    assert named <= fields
    metrics = {span for row in rows("server.md", "`minicpm_.*?`") for span in spans(row[0])}
    there = {*re.findall(r"^# TYPE (\w+)", tiny_server.ask("GET", "/metrics").body.decode(), re.M)}
    assert metrics == {name for name in there if not name.endswith("_created")}


def test_sglang_has_the_options_that_are_translated() -> None:
    sglang = pytest.importorskip("sglang")
    source = (Path(sglang.__file__).parent / "srt" / "server_args.py").read_text()
    table = text("server.md").rpartition("sglang.launch_server`")[2]
    cells = re.findall(r"^\| (`-.*?) \| ", table, re.MULTILINE)
    named = {word for cell in cells for word in re.findall(r"--[a-z-]+", cell)}
    assert len(named) > 10
    assert {word for word in named if f'"{word}"' not in source} == set()


def test_the_service_of_a_mac_starts_a_command_that_parses() -> None:
    job = plistlib.loads(blocks("xml")[0].encode())
    program, *arguments = job["ProgramArguments"]
    assert Path(program).name == "minicpm-mlx"
    (parameters,) = parsed(arguments)
    paths = (program, str(parameters["api_key_file"]), job["StandardErrorPath"])
    assert all(path.startswith("/Users/YOU/") for path in paths)
    assert f"`~/Library/LaunchAgents/{job['Label']}.plist`" in text("server.md")
    assert job["ExitTimeOut"] > parameters["grace"]
