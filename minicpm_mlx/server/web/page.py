"""The page: its components, and the events of its buttons.

Only this module imports Gradio. That takes seconds, so import it when the page is needed.
"""

from __future__ import annotations

import logging
import os
import sys
import time
import traceback
from collections.abc import AsyncGenerator
from contextlib import aclosing
from importlib import resources
from types import SimpleNamespace
from typing import Any

# Gradio reads these at import and when it creates its queue. Otherwise it asks another host for its
# newest version, and after every event computes statistics of the last 10,000 for a closed page.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
os.environ["GRADIO_ANALYTICS_MAX_EVENTS"] = "1"
os.environ["GRADIO_ANALYTICS_CACHE_FREQUENCY"] = str(2**62)

import gradio as gr

from ..service import Service
from .bubbles import bubbles_of
from .controls import (
    DEFAULT_MAX_TOKENS,
    THINK,
    follow_thinking,
    own_sampling,
    read_controls,
    think_choices,
)
from .conversation import WebConversation, takes_system
from .export import markdown_of
from .kept import Message, dump
from .markdown import MATH
from .status import status
from .texts import LANGUAGES, TEXTS, preferred, say

_log = logging.getLogger(__name__)

MAX_MESSAGE = 200_000
"""Characters of a message; the context is shorter."""
SESSIONS = 256
"""Tabs whose replies can be stopped; the least recently used is dropped first."""
KEPT_INTERVAL = 1.0
"""Seconds between two times that the browser gets a growing reply to keep."""


def theme() -> Any:
    """Gradio's default theme with the system's fonts: its own come from another host."""
    sans = ["system-ui", "-apple-system", "PingFang SC", "Noto Sans CJK SC", "sans-serif"]
    mono = ["ui-monospace", "SFMono-Regular", "Menlo", "monospace"]
    return gr.themes.Default(
        primary_hue="teal", neutral_hue="zinc", font=sans, font_mono=mono, radius_size="lg"
    )


def texts() -> Any:
    """The texts in the browser's language, until the user chooses one."""
    english = {key: text for key, (text, _) in TEXTS.items()}
    chinese = {key: text for key, (_, text) in TEXTS.items()}
    return gr.I18n(**{"en": english, "zh": chinese, "zh-CN": chinese, "zh-TW": chinese})


class Page:
    """Builds the page of one service; `blocks` is Gradio's page."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.labels: list[tuple[Any, dict[str, str]]] = []
        """Components, and the keys of the texts that their properties show."""
        self.i18n = texts()
        with gr.Blocks(
            title=f"{service.models[0].name} · MiniCPM", analytics_enabled=False, fill_height=True
        ) as self.blocks:
            self.conversation = gr.State(WebConversation())
            self.kept = gr.Textbox(elem_id="kept", show_label=False, container=False)
            self._head()
            with gr.Row(elem_id="columns"):
                with gr.Column(scale=4, min_width=320, elem_id="talk"):
                    self._chat_column()
                with gr.Column(scale=1, min_width=260, elem_id="settings"):
                    self._settings()
            self._wire()
        # The service has its own limit; this one only limits a flood of clicks.
        self.blocks.queue(max_size=64, default_concurrency_limit=64, api_open=False)
        self.blocks.state_session_capacity = SESSIONS

    def _labelled(self, kind: Any, keys: dict[str, str], **options: Any) -> Any:
        """A component of class `kind` whose properties `keys` are texts in the chosen language."""
        component = kind(**{name: self.i18n(key) for name, key in keys.items()}, **options)
        self.labels.append((component, keys))
        return component

    def _head(self) -> None:
        name = self.service.models[0].name
        with gr.Row(elem_id="head"):
            gr.Markdown(f"# {name}", elem_id="title")
            self.language = gr.Radio(
                [(name, code) for code, name in LANGUAGES.items()],
                value="en",
                show_label=False,
                container=False,
                elem_id="language",
                scale=0,
                min_width=170,
            )
            gr.Button("◐", elem_id="theme", size="sm", scale=0, min_width=44)

    def _chat_column(self) -> None:
        self.chat = gr.Chatbot(
            elem_id="chat",
            show_label=False,
            container=False,
            height="100%",
            buttons=["copy"],
            latex_delimiters=MATH,
            sanitize_html=True,
            allow_tags=False,
            layout="bubble",
            group_consecutive_messages=False,
        )
        self.status = gr.Markdown(elem_id="status")  # gr.HTML would need eval in the browser
        with gr.Row(elem_id="ask", equal_height=True):
            self.box = self._labelled(
                gr.Textbox,
                {"label": "message", "placeholder": "hint"},
                show_label=False,
                container=False,
                lines=1,
                max_lines=8,
                max_length=MAX_MESSAGE,
                autofocus=True,
                scale=1,
                elem_id="box",
            )
            self.submit = self._button("submit", variant="primary")
            self.stop = self._button("stop", variant="stop", visible=False)
        with gr.Row(elem_id="buttons"):
            self.regenerate = self._button("regenerate", size="sm")
            self.undo = self._button("undo", size="sm")
            self.clear = self._button("clear", size="sm")

    def _button(self, key: str, **options: Any) -> Any:
        options |= {"elem_id": key, "scale": 0, "min_width": 96}
        return self._labelled(gr.Button, {"value": key}, **options)

    def _settings(self) -> None:
        models, longest = self.service.models, self.service.context_length
        sampling = own_sampling(self.service, THINK[0])
        thinks = self.service.lm.tokenizer.thinking is not None
        self.served = self._labelled(
            gr.Dropdown,
            {"label": "adapter"},
            choices=[model.name for model in models],
            value=models[0].name,
            visible=len(models) > 1,
            filterable=False,
            elem_id="adapter",
        )
        self.system = self._labelled(
            gr.Textbox,
            {"label": "system", "placeholder": "system_hint"},
            lines=3,
            max_lines=8,
            max_length=MAX_MESSAGE,
            visible=takes_system(self.service),
            elem_id="system",
        )
        self.think = self._labelled(
            gr.Radio,
            {"label": "think", "info": "think_hint"},
            choices=think_choices("en"),
            value=THINK[0],
            visible=thinks,
            elem_id="think",
        )
        self.think_tokens = self._slider("think_tokens", 0, longest, longest, 1, visible=thinks)
        self.top_p = self._slider("top_p", 0.05, 1.0, sampling.top_p, 0.05)
        self.temperature = self._slider("temperature", 0.0, 2.0, sampling.temperature, 0.05)
        default = min(DEFAULT_MAX_TOKENS, longest)
        self.max_tokens = self._slider("max_tokens", 1, longest, default, 1)
        self.export = self._button("export", size="sm")
        self.with_thoughts = self._labelled(
            gr.Checkbox,
            {"label": "with_thoughts"},
            container=False,
            visible=thinks,
            elem_id="with_thoughts",
        )
        self.exported = gr.Textbox(elem_id="exported", show_label=False, container=False)

    def _slider(
        self, key: str, low: float, high: float, value: float, step: float, **options: Any
    ) -> Any:
        options |= {"minimum": low, "maximum": high, "value": value, "step": step, "elem_id": key}
        return self._labelled(gr.Slider, {"label": key, "info": f"{key}_hint"}, **options)

    # Events

    def _wire(self) -> None:
        self.controls = {
            "served": self.served,
            "system": self.system,
            "top_p": self.top_p,
            "temperature": self.temperature,
            "max_tokens": self.max_tokens,
            "think": self.think,
            "think_tokens": self.think_tokens,
        }
        state = [self.conversation, self.kept, self.language]
        inputs = [*state, *self.controls.values()]
        reply = [self.chat, self.status, self.box, self.kept, self.submit, self.stop]
        self.outputs = [*reply, *self._idle_buttons]
        options: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        sends = [self.submit.click, self.box.submit]
        gr.on(sends, self._ask, [self.box, *inputs], self.outputs, **options)
        self.regenerate.click(self._regenerate, inputs, self.outputs, **options)
        self.stop.click(_stop, [self.conversation], None, **options)
        self.undo.click(self._undo, state, self.outputs, **options)
        self.clear.click(self._clear, state, self.outputs, **options)
        self.export.click(self._export, [*state, self.with_thoughts], self.exported, **options)
        sliders = [self.top_p, self.temperature]
        self.think.input(self._follow_thinking, [self.think, *sliders], sliders, **options)
        begun = [*self.outputs, self.language, *self.controls.values()]
        # page.js sends it once at the start: a `load` beside it could cut the connection of both.
        self.kept.blur(self._begin, state, begun, **options)
        relabelled = [component for component, _ in self.labels]
        shown = [self.chat, self.status, *relabelled, self.think]
        self.language.input(self._relabel, state, shown, **options)

    @property
    def _idle_buttons(self) -> list[Any]:
        """The buttons that are disabled during a reply."""
        return [self.regenerate, self.undo, self.clear]

    async def _ask(
        self,
        text: str,
        conversation: WebConversation,
        kept: str | None,
        language: str,
        *controls: Any,
    ) -> AsyncGenerator[tuple[Any, ...], None]:
        if not text.strip():
            yield self._unchanged()
            return
        conversation.resume(kept)
        replies = conversation.ask(self.service, read_controls(self.service, *controls), text)
        async with aclosing(self._update(conversation, language, replies)) as steps:
            async for outputs in steps:
                yield outputs

    async def _regenerate(
        self, conversation: WebConversation, kept: str | None, language: str, *controls: Any
    ) -> AsyncGenerator[tuple[Any, ...], None]:
        conversation.resume(kept)
        replies = conversation.regenerate(self.service, read_controls(self.service, *controls))
        async with aclosing(self._update(conversation, language, replies)) as steps:
            async for outputs in steps:
                yield outputs

    async def _update(
        self,
        conversation: WebConversation,
        language: str,
        replies: AsyncGenerator[list[Message], None],
    ) -> AsyncGenerator[tuple[Any, ...], None]:
        """The outputs as a reply grows; the buttons change with the first and the last."""
        kept_at = 0.0
        async with aclosing(replies):  # so that closing the tab ends the reply at once
            async for messages in replies:
                begins, now = not kept_at, time.monotonic()
                kept: Any = gr.skip()
                if now - kept_at > KEPT_INTERVAL:
                    kept, kept_at = dump(messages, conversation.settings), now
                if begins:
                    text = say("waiting", language)
                    bubbles = bubbles_of(messages, language)
                    yield (bubbles, text, "", kept, *self._buttons(replying=True))
                else:
                    bubbles = bubbles_of(messages, language, growing=True)
                    yield (bubbles, "", gr.skip(), kept, *self._unchanged()[4:])
        yield self._idle_outputs(conversation, language) if kept_at else self._unchanged()

    async def _undo(
        self, conversation: WebConversation, kept: str | None, language: str
    ) -> tuple[Any, ...]:
        conversation.resume(kept)
        conversation.undo()
        return self._idle_outputs(conversation, language)

    async def _clear(
        self, conversation: WebConversation, _: str | None, language: str
    ) -> tuple[Any, ...]:
        conversation.clear()
        return self._idle_outputs(conversation, language)

    async def _begin(
        self, conversation: WebConversation, kept: str | None, _: str, request: gr.Request
    ) -> tuple[Any, ...]:
        """The language, the conversation that the browser has kept, and its controls."""
        language = preferred(request.headers.get("accept-language", ""))
        conversation.resume(kept)
        conversation.take_unanswered()
        values = conversation.settings
        controls = {
            name: {"value": values[name]}
            for name, control in self.controls.items()
            if name in values and _fits(control, values[name])
        }
        controls["think"] = controls.get("think", {}) | {"choices": think_choices(language)}
        updates = [gr.update(**controls.get(name, {})) for name in self.controls]
        return (*self._idle_outputs(conversation, language), language, *updates)

    async def _export(
        self, conversation: WebConversation, kept: str | None, language: str, thoughts: bool
    ) -> str:
        conversation.resume(kept)
        return markdown_of(conversation, language, thoughts=bool(thoughts))

    async def _follow_thinking(self, think: str, top_p: Any, temperature: Any) -> list[Any]:
        sliders = {"top_p": top_p, "temperature": temperature}
        return [*follow_thinking(self.service, think, sliders).values()]

    def _idle_outputs(self, conversation: WebConversation, language: str) -> tuple[Any, ...]:
        """The outputs without a current reply."""
        line = status(conversation, language, self.service.context_length)
        draft = conversation.draft or gr.skip()
        kept = dump(conversation.messages, conversation.settings)
        bubbles = bubbles_of(conversation.messages, language)
        return (bubbles, line, draft, kept, *self._buttons(replying=False))

    def _buttons(self, *, replying: bool) -> list[Any]:
        shown = [gr.update(visible=not replying), gr.update(visible=replying)]
        return [*shown, *(gr.update(interactive=not replying) for _ in self._idle_buttons)]

    def _unchanged(self) -> tuple[Any, ...]:
        return tuple(gr.skip() for _ in self.outputs)

    async def _relabel(
        self, conversation: WebConversation, kept: str | None, language: str
    ) -> list[Any]:
        conversation.resume(kept)
        messages, growing = conversation.messages, conversation.replying
        bubbles: Any = gr.skip() if growing else bubbles_of(messages, language)
        line = status(conversation, language, self.service.context_length)
        labels = (_update_texts(keys, language) for _, keys in self.labels)
        return [bubbles, line, *labels, gr.update(choices=think_choices(language))]


def _fits(control: Any, value: object) -> bool:
    """Whether the control can have a value that the browser has kept."""
    if isinstance(control, gr.Slider):
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return number and control.minimum <= value <= control.maximum  # type: ignore[operator]
    if isinstance(control, gr.Dropdown | gr.Radio):
        return value in [choice for _, choice in control.choices]
    return isinstance(value, str)


def _update_texts(keys: dict[str, str], language: str) -> Any:
    texts: dict[str, Any] = {name: say(key, language) for name, key in keys.items()}
    return gr.update(**texts)


async def _stop(conversation: WebConversation) -> None:
    conversation.stop()


def _log_traceback() -> None:
    """Replaces traceback.print_exc; leaves the error's message out, which may quote the user."""
    error = sys.exc_info()[1]
    if error is not None:
        lines = "".join(traceback.format_tb(error.__traceback__))
        _log.error("the page failed:\n%s%s", lines, type(error).__name__)


# The modules in which Gradio prints errors. They use only print_exc of traceback.
for _module in (gr.queueing, gr.routes, gr.route_utils):
    vars(_module)["traceback"] = SimpleNamespace(print_exc=_log_traceback)


def events(application: Any) -> dict[int, int]:
    """The number of values of each event of the page, by the event's number."""
    return {number: len(event.inputs) for number, event in application.get_blocks().fns.items()}


def application(service: Service, path: str) -> Any:
    """The page as an ASGI application for `path`. It runs on the caller's event loop."""
    blocks = Page(service).blocks
    outer: Any = gr.routes.App()
    gr.mount_gradio_app(
        outer,
        blocks,
        path=path,
        theme=theme(),
        css=resources.files(__package__).joinpath("page.css").read_text(encoding="utf-8"),
        i18n=texts(),
        footer_links=[],
        # Variables of the environment could turn each of these on.
        run_history=False,
        ssr_mode=False,
        mcp_server=False,
        pwa=False,
        enable_monitoring=False,
        show_error=False,
        max_file_size=0,
    )
    blocks.run_startup_events()
    # Gradio polls its queue a thousand times a second, which would keep an idle laptop awake.
    blocks._queue.sleep_when_free = blocks._queue.progress_update_sleep_when_free = 0.02
    return outer.routes[-1].app
