"""The server's home page and its list of routes. No scripts, nothing from other hosts."""

from __future__ import annotations

import re
from functools import cache
from html import escape
from importlib import resources
from string import Template
from typing import Any

from fastapi import Request
from fastapi.responses import HTMLResponse

from .service import Service

POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; "
    "frame-ancestors 'none'"
)

TEXTS = {
    "running": ("is running", "正在运行"),
    "context": ("{count} tokens of context", "上下文 {count} 个词元"),
    "models": ("Models", "模型"),
    "models_hint": (
        "The names that requests use. An adapter is named MODEL:ADAPTER.",
        "请求时使用的名称；适配器写作 模型:适配器。",
    ),
    "clients": ("Clients", "客户端"),
    "clients_hint": ("The address that each client needs.", "各客户端需要填写的地址。"),
    "api": ("API", "接口"),
    "base": ("Base URL", "地址"),
    "try": ("Try it", "试一试"),
    "chat": ("Web chat", "网页聊天"),
    "docs": ("All routes", "全部接口"),
    "health": ("Health", "健康检查"),
    "metrics": ("Metrics", "指标"),
    "document": ("OpenAPI document", "OpenAPI 文档"),
    "home": ("Home", "首页"),
    "other": ("中文", "English"),
    "field": ("Field", "字段"),
    "type": ("Type", "类型"),
}
"""In English and in Chinese."""

CLIENTS = (
    ("OpenAI", "/v1", "OPENAI_BASE_URL"),
    ("Anthropic", "", "ANTHROPIC_BASE_URL"),
    ("Ollama", "", "OLLAMA_HOST"),
    ("SGLang", "", "RuntimeEndpoint(…)"),
)
"""Each API, its path below the server's address, and the setting of its clients."""


def index(request: Request, service: Service) -> HTMLResponse:
    """The models, and the address for each kind of client."""
    say = _PageTexts(request)
    base = str(request.base_url).rstrip("/")
    name = service.models[0].name
    chat = any(getattr(route, "path", "") == "/chat" for route in request.app.routes)
    pages = [("/chat", "chat")] if chat else []
    pages += [("/docs", "docs"), ("/health", "health"), ("/metrics", "metrics")]
    command = (
        f"curl {base}/v1/chat/completions \\\n  -H 'Content-Type: application/json' \\\n"
        f'  -d \'{{"model": "{name}", "messages": [{{"role": "user", "content": "'
        f"{'你好！' if say.chinese else 'Hello!'}\"}}]}}'"
    )
    body = [
        f"<h1><b>{escape(name)}</b> {say('running')}</h1>",
        f"<p class=quiet>minicpm-mlx · {say('context', count=service.context_length)}</p>",
        "<nav>",
        *(f'<a href="{path}">{say(key)}</a>' for path, key in pages),
        "</nav>",
        f"<h2>{say('models')}</h2><p class=quiet>{say('models_hint')}</p><ul>",
        *(f"<li><code>{escape(served.name)}</code>" for served in service.models),
        f"</ul><h2>{say('clients')}</h2><p class=quiet>{say('clients_hint')}</p>",
        f"<table><tr><th>{say('api')}<th>{say('base')}<th>",
        *(
            f"<tr><td>{api}<td><code>{escape(base + path)}</code><td class=quiet>{setting}"
            for api, path, setting in CLIENTS
        ),
        f"</table><h2>{say('try')}</h2><pre>{escape(command)}</pre>",
    ]
    return say.page(name, body)


def docs(request: Request, document: dict[str, Any]) -> HTMLResponse:
    """The OpenAPI document for readers."""
    say = _PageTexts(request)
    schemas = document.get("components", {}).get("schemas", {})
    body = [
        f"<h1>{say('docs')}</h1><nav><a href=/>{say('home')}</a>",
        f"<a href=/openapi.json>{say('document')}</a></nav>",
    ]
    group = ""
    for path, methods in document.get("paths", {}).items():
        for method, operation in methods.items():
            tag = (operation.get("tags") or ["server"])[0]
            if tag != group:
                group = tag
                body.append(f"<h2>{escape(tag)}</h2>")
            text = operation.get("description") or operation.get("summary", "")
            fields = _fields(operation, schemas, say)
            kind = "" if fields else " class=flat"
            body.append(
                f"<details{kind}><summary><b>{method.upper()}</b> <code>{escape(path)}</code> "
                f"<span class=quiet>{escape(text.splitlines()[0] if text else '')}</span>"
                f"</summary>{fields}</details>"
            )
    return say.page(say("docs"), body)


class _PageTexts:
    """Texts in the language of the browser, or of ?lang=."""

    def __init__(self, request: Request):
        language = request.query_params.get("lang") or request.headers.get("accept-language", "")
        self.chinese = language.strip().lower().startswith("zh")
        self._path = request.url.path

    def __call__(self, key: str, **values: object) -> str:
        return escape(TEXTS[key][self.chinese].format(**values))

    def page(self, title: str, body: list[str]) -> HTMLResponse:
        other = f'<a href="{self._path}?lang={"en" if self.chinese else "zh"}">{self("other")}</a>'
        text = _frame().substitute(
            language="zh" if self.chinese else "en",
            title=escape(title),
            other=other,
            body="\n".join(body),
        )
        headers = {"Content-Security-Policy": POLICY, "Vary": "Accept-Language"}
        return HTMLResponse(text, headers=headers)


def _fields(operation: dict[str, Any], schemas: dict[str, Any], say: _PageTexts) -> str:
    """A table of the body's fields."""
    content = operation.get("requestBody", {}).get("content", {}).get("application/json", {})
    schema = content.get("schema", {})
    schema = schemas.get(schema.get("$ref", "").rpartition("/")[2], schema)
    rows = [
        f"<tr><td><code>{escape(name)}</code>{'*' if name in schema.get('required', []) else ''}"
        f"<td class=quiet>{escape(_type_name(field))}<td>{escape(field.get('description', ''))}"
        for name, field in schema.get("properties", {}).items()
    ]
    head = f"<tr><th>{say('field')}<th>{say('type')}<th>"
    return f"<table>{head}{''.join(rows)}</table>" if rows else ""


def _type_name(field: dict[str, Any]) -> str:
    """A short name of a schema, such as "string, or null"."""
    if "$ref" in field:
        return re.split(r"/|__", field["$ref"])[-1]
    if branches := field.get("anyOf") or field.get("oneOf"):
        return ", or ".join(dict.fromkeys(map(_type_name, branches)))
    if "const" in field:
        return repr(field["const"])
    if "enum" in field:
        return " | ".join(map(repr, field["enum"]))
    kind = str(field.get("type", "any"))
    return f"list of {_type_name(field['items'])}" if kind == "array" and "items" in field else kind


@cache
def _frame() -> Template:
    text = resources.files(__package__).joinpath("page.html").read_text(encoding="utf-8")
    return Template(text)
