"""What the server's guide says holds: every name, number and refusal is the server's."""

from __future__ import annotations

import json
import plistlib
import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import minicpm_mlx as mm
from minicpm_mlx import device, memory
from minicpm_mlx.cli.render.texts import TEXTS
from minicpm_mlx.text.chat_template import BUILTIN, Template
from support.guides import (
    GUIDE,
    HERE,
    QUESTION,
    SHAPE,
    blocks,
    commands,
    options,
    parsed,
    rows,
    text,
)

pytest.importorskip("fastapi")

if TYPE_CHECKING:
    from support.serving import Live

GUIDES = [GUIDE, "server_zh.md"]


def spans(cell: str) -> list[str]:
    """What is set as code in a line."""
    return re.findall(r"`([^`\n]+)`", cell)


def section(name: str, heading: str) -> str:
    """A section of a guide, by its heading in English."""
    found = re.findall(r"^## (.*)$", text(GUIDE), re.MULTILINE)
    return text(name).split("\n## ")[1 + found.index(heading)]


@pytest.mark.parametrize(("name", "language"), [*zip(GUIDES, (0, 1), strict=True)])
def test_what_is_printed_is_what_serve_says(name: str, language: int) -> None:
    ready, chat = blocks("text", name)[0].splitlines()
    assert ready == TEXTS["serve.ready"][language].format(name="demo", url=HERE)
    assert chat == TEXTS["serve.page"][language].format(url=f"{HERE}/chat")


def test_a_request_is_logged_as_shown(server: Live) -> None:
    answer = server.ask("POST", "/v1/chat/completions", CHAT)
    assert answer.status == 200
    (shown,) = (span for span in spans(text(GUIDE)) if span.startswith("127.0.0.1 POST"))
    form = re.escape(shown.rpartition(" 200 ")[0]) + r" 200 \d+\.\d\d s"
    assert re.fullmatch(form, shown)
    assert any(re.fullmatch(form, line) for line in server.log)


def test_routes_shown_are_those_there_are(server: Live) -> None:
    served, _, rest = section(GUIDE, "What is served").partition("\n\nStreams")
    shown = [span for span in spans(served) if span.startswith("/")]
    there = set(server.ask("GET", "/openapi.json").json["paths"])
    changing = {
        path for path in there if re.match("/api/(pull|push|create|copy|delete|blobs)", path)
    }
    assert sorted(shown) == sorted(there - changing)
    refused = [span for span in spans(rest) if span in changing]
    assert len(refused) == 3
    for path in refused:
        method = "DELETE" if path == "/api/delete" else "POST"
        assert server.ask(method, path, {"model": "demo"}).status == 403, path


CHAT = {"model": "demo", "messages": QUESTION, "max_tokens": 1}
FUNCTION = {"name": "f", "description": "d", "parameters": {"type": "object", "properties": {}}}
REQUESTS: dict[str, tuple[str, dict[str, Any]]] = {
    "OpenAI, chat": ("/v1/chat/completions", CHAT),
    "OpenAI, completions": ("/v1/completions", {"prompt": "Hi", "max_tokens": 1}),
    "OpenAI, responses": ("/v1/responses", {"input": "Hi", "max_output_tokens": 1}),
    "OpenAI, embeddings": ("/v1/embeddings", {"input": "Hi"}),
    "Anthropic": ("/v1/messages", CHAT),
    "Ollama": (
        "/api/chat",
        {"model": "demo", "messages": QUESTION, "stream": False, "options": {"num_predict": 1}},
    ),
    "SGLang": ("/generate", {"text": "Hi", "sampling_params": {"max_new_tokens": 1}}),
}
"""One that is good for each row of the table of fields."""
VALUES: dict[str, Any] = {
    "audio": {"voice": "a", "format": "wav"},
    "background": True,
    "best_of": 2,
    "cache_control": {"type": "ephemeral"},
    "container": "c",
    "conversation": "c",
    "custom_logit_processor": "c",
    "dimensions": 8,
    "functions": [FUNCTION],
    "image_data": "i",
    "input_embeds": [[0.0]],
    "keep_alive": "5m",
    "log_metrics": False,
    "metadata": {"user_id": "me"},
    "mirostat": 1,
    "moderation": {"model": "m"},
    "num_gpu": 1,
    "num_thread": 1,
    "prediction": {"type": "content", "content": "c"},
    "previous_response_id": "r",
    "prompt": {"id": "p"},
    "prompt_cache_key": "k",
    "reasoning": {"effort": "low"},
    "reasoning_effort": "low",
    "return_hidden_states": True,
    "service_tier": "auto",
    "session_params": {"id": "s"},
    "shift": True,
    "store": True,
    "suffix": "s",
    "template": "t",
    "tfs_z": 0.5,
    "think": True,
    "thinking": {"type": "enabled", "budget_tokens": 1024},
    "token_ids_logprob": [1],
    "truncate": True,
    "truncation": "auto",
    "typical_p": 0.5,
    "use_mmap": True,
    "user": "me",
    "verbosity": "high",
    "web_search_options": {"search_context_size": "low"},
}
OPTIONS = {"mirostat", "tfs_z", "typical_p", "num_gpu", "num_thread", "use_mmap"}
GENERATED = {"suffix", "template"}


def ask_with(server: Live, api: str, name: str) -> Any:
    """The answer to a request with one field more."""
    path, body = REQUESTS[api]
    body = dict(body)
    if name == "tools":
        nested = {"type": "function", "function": FUNCTION}
        flat = {"type": "function", **FUNCTION}
        own = {"name": "f", "input_schema": {"type": "object"}}
        body["tools"] = [{"OpenAI, responses": flat, "Anthropic": own}.get(api, nested)]
    elif name == "images":
        body["messages"] = [{**QUESTION[0], "images": ["aGk="]}]
    elif api == "Ollama" and name in OPTIONS:
        body["options"] = {**body["options"], name: VALUES[name]}
    elif api == "Ollama" and name in GENERATED:
        path = "/api/generate"
        body = {"model": "demo", "prompt": "Hi", "stream": False, name: VALUES[name]}
    else:
        body[name] = VALUES[name]
    return server.ask("POST", path, body)


def fields_shown(column: int) -> Iterator[tuple[str, str]]:
    for row in rows(GUIDE, r"(?:OpenAI, \w+|Anthropic|Ollama|SGLang)"):
        if not row[1].startswith("`http"):
            for name in spans(row[column]):
                if name != "n" and not name.startswith("/"):
                    yield row[0], name


@pytest.mark.parametrize(("api", "name"), [*fields_shown(1)])
def test_a_field_said_to_be_refused_is_named_in_a_400(server: Live, api: str, name: str) -> None:
    answer = ask_with(server, api, name)
    assert answer.status == 400, answer.body
    assert re.search(rf"\b{name}\b", answer.body.decode())


@pytest.mark.parametrize(("api", "name"), [*fields_shown(2)])
def test_a_field_said_to_be_accepted_is(server: Live, api: str, name: str) -> None:
    answer = ask_with(server, api, name)
    assert answer.status == 200, answer.body


def test_both_columns_of_fields_are_long() -> None:
    assert len([*fields_shown(1)]) > 30
    assert len([*fields_shown(2)]) > 15


def test_the_refusal_shown_is_the_servers(server: Live) -> None:
    answer = server.ask("POST", "/v1/chat/completions", {**CHAT, "temprature": 1})
    assert answer.status == 400
    assert answer.json == json.loads(blocks("json")[0])


SCHEMA = {"enum": [1, 2]}
TYPE = {"type": "json_schema"}
NAMED = {**TYPE, "name": "number"}
OBJECT = r"\s*\{.*"  # is long, and cut off
FORMS: list[tuple[str, str, dict[str, Any], str]] = [
    ("OpenAI, chat", "content", {"response_format": {"type": "json_object"}}, OBJECT),
    ("OpenAI, completions", "text", {"guided_json": SCHEMA}, "1|2"),
    ("OpenAI, completions", "text", {"guided_choice": ["blue", "green"]}, "blue|green"),
    ("OpenAI, responses", "text", {"text": {"format": {"type": "json_object"}}}, OBJECT),
    ("OpenAI, responses", "text", {"text": {"format": {**NAMED, "schema": SCHEMA}}}, "1|2"),
    ("Anthropic", "text", {"output_config": {"format": {**TYPE, "schema": SCHEMA}}}, "1|2"),
    ("Ollama", "content", {"format": "json"}, OBJECT),
    ("Ollama", "content", {"format": SCHEMA}, "1|2"),
    ("SGLang", "text", {"sampling_params": {"json_schema": "$$ANY$$"}}, OBJECT),
    ("SGLang", "text", {"sampling_params": {"json_schema": json.dumps(SCHEMA)}}, "1|2"),
    ("SGLang", "text", {"sampling_params": {"regex": "[A-D]"}}, "[A-D]"),
    ("SGLang", "text", {"sampling_params": {"ebnf": 'root ::= "x" | "y"'}}, "[xy]"),
]
"""An API, where its answer has the text, how it is asked for a form, and what fits that."""


@pytest.mark.parametrize(("api", "key", "form", "fits"), FORMS)
def test_a_form_is_kept_where_the_table_says_so(
    server: Live, api: str, key: str, form: dict[str, Any], fits: str
) -> None:
    path, body = REQUESTS[api]
    more = {"options": {"num_predict": 24}} if api == "Ollama" else {}
    if api == "SGLang":
        form = {"sampling_params": {"max_new_tokens": 24, **form["sampling_params"]}}
    elif api != "Ollama":
        more = {"max_output_tokens" if api == "OpenAI, responses" else "max_tokens": 24}
    answer = server.ask("POST", path, {**body, **more, **form})
    assert answer.status == 200, answer.body
    (said,) = re.findall(rf'"{key}":("(?:[^"\\]|\\.)+")', answer.body.decode())
    named = {
        span.split(":")[0].split(".")[0] for span in spans(section(GUIDE, "Structured output"))
    }
    assert {*form.get("sampling_params", form)} - {"max_new_tokens"} <= named
    assert re.fullmatch(fits, json.loads(said), re.DOTALL)


def test_no_template_of_minicpms_takes_tools() -> None:
    named = {card.template for card in mm.cards().values() if card.name != "demo"} - {None}
    assert named == {*BUILTIN}
    assert not any(Template(source).takes_tools for source in BUILTIN.values())


def test_a_name_of_this_machine_in_a_container_is_served_once_it_is_allowed(
    server: Live, serving: Any
) -> None:
    (name,) = re.findall(r"`--allowed-host (host\S+)`", text(GUIDE))
    asked = {"Host": f"{name}:8080"}
    assert server.ask("GET", "/health", headers=asked).status == 403
    with serving(settings={"allowed_hosts": (name,)}) as other:
        assert other.ask("GET", "/health", headers=asked).status == 200


def test_without_memory_of_prompts_nobody_sees_what_others_asked(
    server: Live, serving: Any
) -> None:
    def cached(live: Live) -> int:
        answer = live.ask("POST", "/v1/chat/completions", CHAT)
        return int(answer.json["usage"]["prompt_tokens_details"]["cached_tokens"])

    assert [cached(server), cached(server)][1] > 0
    with serving(cache_bytes=0) as other:
        assert [cached(other), cached(other)] == [0, 0]


@pytest.mark.parametrize("name", GUIDES)
def test_metrics_shown_are_those_there_are(server: Live, name: str) -> None:
    found = re.findall(r"^# TYPE (\w+)", server.ask("GET", "/metrics").body.decode(), re.MULTILINE)
    there = {one for one in found if not one.endswith("_created")}
    assert {one for row in rows(name, "`minicpm_.*?`") for one in spans(row[0])} == there


@pytest.mark.parametrize("name", GUIDES)
def test_limits_shown_are_the_servers(name: str) -> None:
    from minicpm_mlx.server.http.settings import Settings
    from minicpm_mlx.server.openai.prompts import MAX_PROMPTS
    from minicpm_mlx.server.parameters import MAX_STOPS
    from minicpm_mlx.server.service import QUEUE, WIDTH

    lines = section(name, "Limits").partition("\n\n**")[0].splitlines()
    shown = [line.split(" | ")[1] for line in lines if line.startswith("| ")][1:]
    numbers = [[*map(int, re.findall(r"\d+", one.replace(",", "")))] for one in shown]
    have = {one.name: one.default for one in fields(Settings)}
    (serve,) = parsed(["serve"])
    assert numbers == [
        [WIDTH],
        [QUEUE],
        [],
        [],
        [],
        [int(serve["grace"])],
        [have["max_body"] // 2**20, int(have["body_seconds"])],
        [int(have["header_seconds"])],
        [have["max_requests"], have["max_connections"]],
        [MAX_PROMPTS],
        [MAX_STOPS, 1024],
    ]


@pytest.mark.parametrize("name", GUIDES)
def test_every_command_of_the_guide_parses(name: str) -> None:
    given = commands(name)
    assert len(given) > 8
    for arguments in given:
        list(parsed(arguments))


@pytest.mark.parametrize("name", GUIDES)
def test_every_option_named_in_the_guide_exists(name: str) -> None:
    # In the tables at the end the first column is another program's.
    lines = [re.sub(r"^\| `-.*? \| ", "| ", line) for line in text(name).splitlines()]
    named = {
        word
        for span in re.findall(r"`([^`\n]+)`", "\n".join(lines))
        for word in re.findall(r"(?<!\S)--[a-z-]+", span)
    }
    assert len(named) > 15
    assert named <= options()


@pytest.mark.parametrize("name", GUIDES)
def test_sglang_has_the_options_that_are_translated(name: str) -> None:
    pytest.importorskip("sglang")
    import sglang

    assert sglang.__file__
    source = (Path(sglang.__file__).parent / "srt" / "server_args.py").read_text()
    table = text(name).rpartition("sglang.launch_server`")[2]
    named = {
        word
        for cell in re.findall(r"^\| (`-.*?) \| ", table, re.MULTILINE)
        for word in re.findall(r"--[a-z-]+", cell)
    }
    assert len(named) > 10
    assert {word for word in named if f'"{word}"' not in source} == set()


def test_both_guides_give_the_same_examples() -> None:
    assert commands(GUIDES[0]) == commands(GUIDES[1])
    for language in ("python", "js", "sh", "yaml", "json", "xml"):
        assert blocks(language, GUIDES[0]) == blocks(language, GUIDES[1]), language
    shapes = [
        [line.count(" | ") for line in text(name).splitlines() if line.startswith("| ")]
        for name in GUIDES
    ]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("name", GUIDES)
def test_links_within_the_guides_lead_somewhere(name: str) -> None:
    for file, heading in re.findall(r"\]\(([\w./]*)#([^)]+)\)", text(name)):
        path = Path(__file__).parents[2] / "docs" / (file or name)
        found = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
        anchors = {re.sub(r"[^\w\- ]", "", one.lower()).replace(" ", "-") for one in found}
        assert heading in anchors, (file, heading)


def test_the_service_of_a_mac_starts_a_command_that_parses() -> None:
    found = plistlib.loads(blocks("xml")[0].encode())
    program, *arguments = found["ProgramArguments"]
    assert Path(program).name == "minicpm-mlx"
    (given,) = parsed(arguments)
    paths = (program, str(given["api_key_file"]), found["StandardErrorPath"])
    assert all(path.startswith("/Users/YOU/") for path in paths)
    label, launchctl = (
        found["Label"],
        re.findall(r"^\$ (launchctl .*?)(?:  +#|$)", text(GUIDE), re.M),
    )
    file, job = f"~/Library/LaunchAgents/{label}.plist", f"gui/$(id -u)/{label}"
    assert f"`{file}`" in text(GUIDE)
    assert launchctl == [
        f"launchctl bootstrap gui/$(id -u) {file}",
        f"launchctl kickstart -k {job}",
        f"launchctl bootout {job}",
    ]
    assert found["ExitTimeOut"] > given["grace"]


@pytest.mark.parametrize("name", GUIDES)
def test_memory_shown_is_what_is_shared_out(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SHAPE))
    config = mm.Config.load(tmp_path)
    monkeypatch.setattr(device, "on_cpu", lambda: False)  # as on a Mac
    shown = rows(name, r"\d+ GB")
    assert len(shown) == 4
    for mac, tokens, remembered in shown:
        total = int(mac.removesuffix(" GB")) * 2**30 * 3 // 4
        monkeypatch.setattr(device, "available_memory", lambda total=total: total)
        plan = memory.estimate(config, dtype="float16")
        left = plan.available - plan.weights - plan.working
        positions = left * 2 // 5 * plan.context // plan.cache
        assert int(tokens.replace(",", "")) == positions // 100 * 100
        assert float(remembered.removesuffix(" GB")) == int(left / 5e8) / 10
        if mac == "16 GB":
            assert [positions // size for size in (plan.context, 1000)] == [2, 12]
    assert f"{plan.cache // plan.context // 1024} KiB" in text(name)
