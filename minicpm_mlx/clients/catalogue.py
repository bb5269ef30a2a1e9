"""Clients of the server, and the settings each of them reads."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minicpm_mlx.errors import InvalidArgumentError

from . import notes, paths
from .server_address import ID, ServerAddress


@dataclass(frozen=True, kw_only=True)
class Client:
    """A program, and how it is told of a server."""

    name: str
    title: str
    path: Callable[[], Path] | None = None
    """Its settings file; None where it has none that may be written."""
    settings: Callable[[ServerAddress], Any] | None = None
    """Data to merge into the file."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Settings the file must have, which stay as they are where it has them."""
    variables: Callable[[ServerAddress], Mapping[str, str]] | None = None
    """Environment variables it reads; a value that begins with $ is a variable of the shell."""
    example: Callable[[ServerAddress], str] | None = None
    """Code, or fields of a form."""
    start: Callable[[ServerAddress], str] | None = None
    """Command that uses the server then."""
    note: Callable[[ServerAddress], notes.Note] = lambda at: notes.NONE
    """What else to know."""
    install: str = ""
    """Command that installs the program; empty where it is no program of the shell."""
    agent: bool = False
    """Whether long instructions go before each question."""
    not_written: str = ""
    """Why --write is refused."""


def find_client(name: str) -> Client:
    """A client by its name, however it is written."""
    plain = name.lower().replace("-", "").replace("_", "").replace(" ", "")
    for client in CLIENTS:
        if plain in (client.name.replace("-", ""), client.title.lower().replace(" ", "")):
            return client
    names = ", ".join(client.name for client in CLIENTS)
    raise InvalidArgumentError(f"{name} is none of the clients known here: {names}")


def _shell(variable: str) -> str:
    return f"${variable}"


def _openai_variables(at: ServerAddress) -> dict[str, str]:
    return {"OPENAI_BASE_URL": at.openai, "OPENAI_API_KEY": at.secret(_shell)}


def _python_example(at: ServerAddress) -> str:
    return f"""from openai import OpenAI

client = OpenAI()
reply = client.chat.completions.create(
    model={at.model!r}, messages=[{{"role": "user", "content": "Hello"}}]
)
print(reply.choices[0].message.content)"""


def _node_example(at: ServerAddress) -> str:
    return f"""import OpenAI from "openai";

const client = new OpenAI();
const reply = await client.chat.completions.create({{
  model: {at.model!r}, messages: [{{ role: "user", content: "Hello" }}] }});
console.log(reply.choices[0].message.content);"""


def _claude_code(at: ServerAddress) -> dict[str, Any]:
    names = ("", "DEFAULT_OPUS_", "DEFAULT_SONNET_", "DEFAULT_HAIKU_")
    env = {
        "ANTHROPIC_BASE_URL": at.url,
        **{f"ANTHROPIC_{name}MODEL": at.model for name in names},
        "CLAUDE_CODE_MAX_OUTPUT_TOKENS": str(at.reply),
        "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
    }
    if at.key is None and at.key_variable:
        return {"env": env, "apiKeyHelper": f"printenv {at.key_variable}"}
    return {"env": env | {"ANTHROPIC_AUTH_TOKEN": at.secret(str)}}


def _codex(at: ServerAddress) -> dict[str, Any]:
    provider = {"name": "MiniCPM on MLX", "base_url": at.openai, "wire_api": "responses"}
    if at.key is not None:
        provider["experimental_bearer_token"] = at.key
    elif at.key_variable:
        provider["env_key"] = at.key_variable
    return {
        "model": at.model,
        "model_provider": ID,
        "model_context_window": at.window,
        # Without sub-agents and a search that only OpenAI's service has: a shorter prompt.
        "web_search": "disabled",
        "agents": {"enabled": False},
        "model_providers": {ID: provider},
    }


def _opencode_path() -> Path:
    if named := os.environ.get("OPENCODE_CONFIG"):
        return Path(named).expanduser()
    folder = paths.xdg_config("opencode")
    commented = folder / "opencode.jsonc"
    return commented if commented.exists() else folder / "opencode.json"


def _opencode(at: ServerAddress) -> dict[str, Any]:
    options = {"baseURL": at.openai, "apiKey": at.secret(lambda name: f"{{env:{name}}}")}
    model = {"name": at.model, "limit": {"context": at.window, "output": at.reply}}
    return {
        "provider": {
            ID: {
                "npm": "@ai-sdk/openai-compatible",
                "name": "MiniCPM on MLX",
                "options": options,
                "models": {at.model: model},
            }
        }
    }


def _pi(at: ServerAddress) -> dict[str, Any]:
    model = {"id": at.model, "contextWindow": at.window, "maxTokens": at.reply}
    provider = {"baseUrl": at.openai, "api": "openai-completions", "apiKey": at.secret(str)}
    return {"providers": {ID: {**provider, "models": [model]}}}


def _cline(at: ServerAddress) -> str:
    fields = {
        "API Provider": "OpenAI Compatible",
        "Base URL": at.openai,
        "OpenAI Compatible API Key": at.secret(_shell),
        "Model ID": at.model,
        "Context Window Size": str(at.window),
    }
    return "\n".join(f"{name}: {value}" for name, value in fields.items())


def _cline_start(at: ServerAddress) -> str:
    key = at.secret(_shell)
    quoted = f'"{key}"' if key.startswith("$") else shlex.quote(key)
    return (
        f"cline auth --provider openai-compatible --baseurl {shlex.quote(at.openai)} "
        f"--modelid {shlex.quote(at.model)} --apikey {quoted}"
    )


def _continue(at: ServerAddress) -> dict[str, Any]:
    model = {
        "name": ID,
        "provider": "openai",
        "model": at.model,
        "apiBase": at.openai,
        "apiKey": at.secret(lambda name: f"${{{{ secrets.{name} }}}}"),
        "roles": ["chat", "edit", "apply"],
        "capabilities": ["tool_use"],
        "defaultCompletionOptions": {"contextLength": at.window, "maxTokens": at.reply},
    }
    return {"models": [model]}


def _zed(at: ServerAddress) -> dict[str, Any]:
    model = {
        "name": at.model,
        "display_name": at.model,
        "max_tokens": at.window,
        "max_output_tokens": at.reply,
        "capabilities": {
            "tools": True,
            "images": False,
            "parallel_tool_calls": True,
            "prompt_cache_key": False,
        },
    }
    provider = {"api_url": at.openai, "available_models": [model]}
    return {"language_models": {"openai_compatible": {ID: provider}}}


def _open_webui(at: ServerAddress) -> dict[str, str]:
    return {
        "OPENAI_API_BASE_URLS": at.openai,
        "OPENAI_API_KEYS": at.secret(_shell),
        "ENABLE_OLLAMA_API": "false",
    }


def _fields(at: ServerAddress) -> str:
    return "\n".join(
        (
            f"OpenAI base URL: {at.openai}",
            f"Anthropic base URL: {at.url}",
            f"Ollama host: {at.url}",
            f"Model: {at.model}",
            f"API key: {at.secret(_shell)}",
            f"Context: {at.window}",
        )
    )


def _llm_path() -> Path:
    named = os.environ.get("LLM_USER_PATH")
    folder = Path(named) if named else paths.application("io.datasette.llm")
    return folder / "extra-openai-models.yaml"


def _llm(at: ServerAddress) -> list[dict[str, Any]]:
    model: dict[str, Any] = {
        "model_id": ID,
        "model_name": at.model,
        "api_base": at.openai,
        "supports_tools": True,
        "supports_schema": True,
    }
    return [model | ({"api_key_name": ID} if at.key or at.key_variable else {})]


def _aichat(at: ServerAddress) -> dict[str, Any]:
    model = {
        "name": at.model,
        "max_input_tokens": at.window,
        "max_output_tokens": at.reply,
        "supports_function_calling": True,
    }
    client = {"type": "openai-compatible", "name": ID, "api_base": at.openai}
    key = {} if at.key is None and at.key_variable else {"api_key": at.secret(str)}
    return {"clients": [client | key | {"models": [model]}]}


CLIENTS = (
    Client(
        name="openai-python",
        title="OpenAI SDK (Python)",
        variables=_openai_variables,
        example=_python_example,
        not_written="it reads environment variables, no file",
    ),
    Client(
        name="openai-node",
        title="OpenAI SDK (npm)",
        variables=_openai_variables,
        example=_node_example,
        not_written="it reads environment variables, no file",
    ),
    Client(
        name="claude-code",
        title="Claude Code",
        path=lambda: paths.home(".claude", f"{ID}.json", variable="CLAUDE_CONFIG_DIR"),
        settings=_claude_code,
        start=lambda at: f"claude --settings {_quoted_path(find_client('claude-code'))}",
        note=lambda at: notes.own_file("claude"),
        install="npm install -g @anthropic-ai/claude-code",
        agent=True,
    ),
    Client(
        name="codex",
        title="Codex",
        path=lambda: paths.home(".codex", f"{ID}.config.toml", variable="CODEX_HOME"),
        settings=_codex,
        start=lambda at: f"codex --profile {ID}",
        note=lambda at: notes.own_file("codex"),
        install="npm install -g @openai/codex",
        agent=True,
    ),
    Client(
        name="opencode",
        title="OpenCode",
        path=_opencode_path,
        settings=_opencode,
        start=lambda at: f"opencode --model {shlex.quote(f'{ID}/{at.model}')}",
        install="npm install -g opencode-ai",
        agent=True,
    ),
    Client(
        name="pi",
        title="pi",
        path=lambda: (
            paths.home(".pi", "agent", "models.json")
            if not os.environ.get("PI_CODING_AGENT_DIR")
            else paths.home("", "models.json", variable="PI_CODING_AGENT_DIR")
        ),
        settings=_pi,
        start=lambda at: f"pi --provider {ID} --model {shlex.quote(at.model)}",
        install="npm install -g @earendil-works/pi-coding-agent",
        agent=True,
    ),
    Client(
        name="cline",
        title="Cline",
        example=_cline,
        start=_cline_start,
        install="npm install -g cline",
        agent=True,
        not_written="it keeps its settings and keys in a store of its own; fill in its form, or "
        "run the command that is printed without --write",
    ),
    Client(
        name="continue",
        title="Continue",
        path=lambda: paths.home(".continue", "config.yaml", variable="CONTINUE_GLOBAL_DIR"),
        settings=_continue,
        defaults={"name": "Local", "version": "1.0.0", "schema": "v1"},
        note=notes.continue_key,
        agent=True,
    ),
    Client(
        name="zed",
        title="Zed",
        path=lambda: paths.xdg_config("zed", "settings.json"),
        settings=_zed,
        note=notes.derived_key,
        agent=True,
    ),
    Client(
        name="open-webui",
        title="Open WebUI",
        variables=_open_webui,
        start=lambda at: "open-webui serve",
        note=notes.open_webui,
        install="pip install open-webui",
        not_written="it keeps its settings in a database; set the variables before its first "
        "start, or use its Admin Panel",
    ),
    Client(
        name="other",
        title="Clients of LM Studio, Ollama or OpenAI",
        example=_fields,
        not_written="there is no one file for them; fill the values into the client's form",
    ),
    Client(
        name="llm",
        title="llm",
        path=_llm_path,
        settings=_llm,
        start=lambda at: f"llm -m {ID} Hello",
        note=notes.llm_key,
        install="pip install llm",
    ),
    Client(
        name="aichat",
        title="aichat",
        path=lambda: (
            Path(os.environ["AICHAT_CONFIG_DIR"]) / "config.yaml"
            if os.environ.get("AICHAT_CONFIG_DIR")
            else paths.application("aichat", "config.yaml")
        ),
        settings=_aichat,
        start=lambda at: f"aichat --model {shlex.quote(f'{ID}:{at.model}')} Hello",
        note=notes.aichat_key,
        install="cargo install aichat",
    ),
)


def _quoted_path(client: Client) -> str:
    assert client.path is not None
    return shlex.quote(str(client.path()))
