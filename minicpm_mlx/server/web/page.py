"""The page: what is on it, where, and what its buttons do.

Gradio is imported here alone, which takes it seconds: import this module when the page is wanted.
"""

from __future__ import annotations

import logging
import os
import sys
import traceback
from collections.abc import AsyncGenerator
from contextlib import aclosing
from importlib import resources
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

# Read when Gradio is imported or makes its queue. It would ask another host for its newest version,
# and after every event sum up in pandas how long the last 10,000 took, for a page that is closed.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
os.environ["GRADIO_ANALYTICS_MAX_EVENTS"] = "1"
os.environ["GRADIO_ANALYTICS_CACHE_FREQUENCY"] = str(2**62)

import gradio as gr

from .conversation import PageSettings, WebConversation, takes_system
from .markdown import drawn
from .status import status
from .texts import (
    LANGUAGES,
    TEXTS,
    preferred,
    say,
)

if TYPE_CHECKING:
    from minicpm_mlx.server.service import Service

_log = logging.getLogger(__name__)

LONGEST_MESSAGE = 200_000
"""Characters; the context is shorter."""
SESSIONS = 256
"""Tabs whose conversations are kept; the one that was longest silent is forgotten first."""
LARGEST_REPLY = 2048
"""Tokens, until the user moves the slider; that of MiniCPM's own page."""

MATH: list[dict[str, str | bool]] = [
    {"left": "$$", "right": "$$", "display": True},
    {"left": "\\[", "right": "\\]", "display": True},
    {"left": "\\(", "right": "\\)", "display": False},
]
"""Not $...$, which is also what stands between two prices: see markdown.py."""


def theme() -> Any:
    """Gradio's own look in the system's fonts: its default ones come from another host."""
    sans = ["system-ui", "-apple-system", "PingFang SC", "Noto Sans CJK SC", "sans-serif"]
    mono = ["ui-monospace", "SFMono-Regular", "Menlo", "monospace"]
    return gr.themes.Default(
        primary_hue="teal", neutral_hue="zinc", font=sans, font_mono=mono, radius_size="lg"
    )


def texts() -> Any:
    """The texts as Gradio shows them before anything is pressed: in the browser's language."""
    table = {key: (value[0], value[1]) for key, value in TEXTS.items()}
    english = {key: value[0] for key, value in table.items()}
    chinese = {key: value[1] for key, value in table.items()}
    return gr.I18n(**{"en": english, "zh": chinese, "zh-CN": chinese, "zh-TW": chinese})


class Page:
    """Builds the page of one service; `blocks` is the whole of it."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.labels: list[tuple[Any, dict[str, str]]] = []
        """Components with the texts that their properties show, by key."""
        self.i18n = texts()
        with gr.Blocks(
            title=f"{service.names[0].name} · MiniCPM", analytics_enabled=False, fill_height=True
        ) as self.blocks:
            self.conversation = gr.State(WebConversation())
            self._head()
            with gr.Row(elem_id="columns"):
                with gr.Column(scale=4, min_width=320, elem_id="talk"):
                    self._talk()
                with gr.Column(scale=1, min_width=260, elem_id="settings"):
                    self._settings()
            self._wire()
        # The service has its own bound; this one only keeps a flood of clicks in check.
        self.blocks.queue(max_size=64, default_concurrency_limit=64, api_open=False)
        self.blocks.state_session_capacity = SESSIONS

    def _said(self, component: Any, **keys: str) -> Any:
        """A component whose properties are texts, in whatever language is chosen."""
        made = component(**{name: self.i18n(key) for name, key in keys.items()})
        self.labels.append((made, keys))
        return made

    def _head(self) -> None:
        name = self.service.names[0].name
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

    def _talk(self) -> None:
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
            self.box = self._said(
                lambda **given: gr.Textbox(
                    show_label=False,
                    container=False,
                    lines=1,
                    max_lines=8,
                    max_length=LONGEST_MESSAGE,
                    autofocus=True,
                    scale=1,
                    elem_id="box",
                    **given,
                ),
                label="message",
                placeholder="hint",
            )
            self.submit = self._button("submit", variant="primary")
            self.stop = self._button("stop", variant="stop", visible=False)
        with gr.Row(elem_id="buttons"):
            self.regenerate = self._button("regenerate", size="sm")
            self.undo = self._button("undo", size="sm")
            self.clear = self._button("clear", size="sm")

    def _button(self, key: str, **how: Any) -> Any:
        return self._said(
            lambda value: gr.Button(value, elem_id=key, scale=0, min_width=96, **how), value=key
        )

    def _settings(self) -> None:
        names, sampling = self.service.names, self.service.lm.sampling
        self.served = self._said(
            lambda **given: gr.Dropdown(
                [one.name for one in names],
                value=names[0].name,
                visible=len(names) > 1,
                filterable=False,
                elem_id="adapter",
                **given,
            ),
            label="adapter",
        )
        self.system = self._said(
            lambda **given: gr.Textbox(
                lines=3,
                max_lines=8,
                max_length=LONGEST_MESSAGE,
                visible=takes_system(self.service),
                elem_id="system",
                **given,
            ),
            label="system",
            placeholder="system_hint",
        )
        longest = self.service.context_length
        self.top_p = self._slider("top_p", 0.05, 1.0, sampling.top_p, 0.05)
        self.temperature = self._slider("temperature", 0.0, 2.0, sampling.temperature, 0.05)
        self.max_tokens = self._slider("max_tokens", 1, longest, min(LARGEST_REPLY, longest), 1)

    def _slider(self, key: str, low: float, high: float, value: float, step: float) -> Any:
        return self._said(
            lambda **given: gr.Slider(low, high, value=value, step=step, elem_id=key, **given),
            label=key,
            info=f"{key}_hint",
        )

    # What the buttons do

    def _wire(self) -> None:
        controls = [self.served, self.system, self.top_p, self.temperature, self.max_tokens]
        given = [self.conversation, self.language, *controls]
        self.drawn = [self.chat, self.status, self.box, self.submit, self.stop, *self._later]
        how: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        gr.on(
            [self.submit.click, self.box.submit],
            self._ask,
            [self.box, *given],
            self.drawn,
            **how,
        )
        self.regenerate.click(self._regenerate, given, self.drawn, **how)
        said = [self.conversation, self.language]
        self.stop.click(_stop, [self.conversation], None, **how)
        self.undo.click(self._undo, said, self.drawn, **how)
        self.clear.click(self._clear, said, self.drawn, **how)
        relabelled = [component for component, _ in self.labels]
        self.language.input(self._relabel, said, [self.status, *relabelled], **how)
        self.blocks.load(_language, None, [self.language], **how)

    @property
    def _later(self) -> list[Any]:
        """The buttons that must wait for the reply."""
        return [self.regenerate, self.undo, self.clear]

    async def _ask(
        self, text: str, conversation: WebConversation, language: str, *controls: Any
    ) -> AsyncGenerator[tuple[Any, ...], None]:
        if not text.strip():
            yield self._same()
            return
        growing = conversation.ask(self.service, _read(*controls), text)
        async with aclosing(self._draw(conversation, language, growing)) as steps:
            async for outputs in steps:
                yield outputs

    async def _regenerate(
        self, conversation: WebConversation, language: str, *controls: Any
    ) -> AsyncGenerator[tuple[Any, ...], None]:
        growing = conversation.regenerate(self.service, _read(*controls))
        async with aclosing(self._draw(conversation, language, growing)) as steps:
            async for outputs in steps:
                yield outputs

    async def _draw(
        self,
        conversation: WebConversation,
        language: str,
        growing: AsyncGenerator[list[dict[str, str]], None],
    ) -> AsyncGenerator[tuple[Any, ...], None]:
        """The outputs as a reply grows: buttons change with its first and its last."""
        begun = False
        async with aclosing(growing):  # so that a closed tab ends the reply, and at once
            async for messages in growing:
                if begun:
                    yield (_bubbles(messages), "", *self._same()[2:])
                else:
                    begun = True
                    waiting = say("waiting", language)
                    yield (_bubbles(messages), waiting, "", *self._buttons(replying=True))
        yield self._settled(conversation, language) if begun else self._same()

    async def _undo(self, conversation: WebConversation, language: str) -> tuple[Any, ...]:
        conversation.undo()
        return self._settled(conversation, language)

    async def _clear(self, conversation: WebConversation, language: str) -> tuple[Any, ...]:
        conversation.clear()
        return self._settled(conversation, language)

    def _settled(self, conversation: WebConversation, language: str) -> tuple[Any, ...]:
        """The outputs when no reply is coming."""
        what = status(conversation, language, self.service.context_length)
        draft = conversation.draft or gr.skip()
        return (_bubbles(conversation.messages), what, draft, *self._buttons(replying=False))

    def _buttons(self, *, replying: bool) -> list[Any]:
        shown = [gr.update(visible=not replying), gr.update(visible=replying)]
        return [*shown, *(gr.update(interactive=not replying) for _ in self._later)]

    def _same(self) -> tuple[Any, ...]:
        return tuple(gr.skip() for _ in self.drawn)

    async def _relabel(self, conversation: WebConversation, language: str) -> list[Any]:
        what = status(conversation, language, self.service.context_length)
        return [what, *(_labelled(keys, language) for _, keys in self.labels)]


def _read(
    served: str,
    system: str | None,
    top_p: float | None,
    temperature: float | None,
    max_tokens: float | None,
) -> PageSettings:
    """The controls; an emptied one is None."""
    return PageSettings(
        served=served,
        system=system or "",
        top_p=top_p,
        temperature=temperature,
        max_tokens=None if max_tokens is None else int(max_tokens),
    )


def _labelled(keys: dict[str, str], language: str) -> Any:
    texts: dict[str, Any] = {name: say(key, language) for name, key in keys.items()}
    return gr.update(**texts)


def _bubbles(messages: list[dict[str, str]]) -> list[dict[str, Any]]:
    """Messages as Gradio draws them; bare strings would lose their indentation."""
    return [
        {"role": one["role"], "content": [{"type": "text", "text": drawn(one["content"])}]}
        for one in messages
    ]


async def _stop(conversation: WebConversation) -> None:
    conversation.stop()


async def _language(request: gr.Request) -> str:
    return preferred(request.headers.get("accept-language", ""))


def _print_place() -> None:
    """What traceback.print_exc prints, without the error's message: it may quote what was typed."""
    error = sys.exc_info()[1]
    if error is not None:
        place = "".join(traceback.format_tb(error.__traceback__))
        _log.error("the page failed:\n%s%s", place, type(error).__name__)


# Where Gradio prints errors. All that these modules use of traceback is print_exc.
for _module in (gr.queueing, gr.routes, gr.route_utils):
    vars(_module)["traceback"] = SimpleNamespace(print_exc=_print_place)


def events(application: Any) -> dict[int, int]:
    """How many values each event of the page takes, by its number."""
    return {number: len(one.inputs) for number, one in application.get_blocks().fns.items()}


def application(service: Service, path: str) -> Any:
    """The page as an ASGI application to be mounted at `path`; it runs on the event loop that this
    is called on."""
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
        # Each can be turned on by a variable of the environment as well.
        run_history=False,
        ssr_mode=False,
        mcp_server=False,
        pwa=False,
        enable_monitoring=False,
        show_error=False,
        max_file_size=0,
    )
    blocks.run_startup_events()
    # Gradio looks for work a thousand times a second, which an idle laptop can do without.
    blocks._queue.sleep_when_free = blocks._queue.progress_update_sleep_when_free = 0.02
    return outer.routes[-1].app
