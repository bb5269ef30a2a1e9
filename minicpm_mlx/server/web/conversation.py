"""A conversation of the page with the service, without its display."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterable
from contextlib import aclosing, suppress
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

from ...lm.outputs import Stats
from ..http.api_error import ApiError
from ..reply_stream import Chunk, GenerationRequest
from ..service import Service, Thinking
from .kept import Message, parse

T = TypeVar("T")

_log = logging.getLogger(__name__)

INTERVAL = 0.05
"""Seconds between two updates of a growing reply; nobody sees more, and each costs."""


@dataclass(frozen=True, kw_only=True)
class PageSettings:
    """The values of the page's controls."""

    served: str
    system: str
    top_p: float | None
    temperature: float | None
    """None: the model's default."""
    max_tokens: int | None
    """None: as far as the context goes."""
    think: str = "auto"
    """"on", "off" or "auto", which leaves it to the model."""
    think_tokens: int | None = None
    """Longest thought, in tokens; None: no limit."""


@dataclass(eq=False)
class WebConversation:
    """The messages of one tab, and the result of its last question."""

    messages: list[Message] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    """The controls of the last question, by name."""
    replying: bool = False
    draft: str = ""
    """A question without a reply, to be put back into the input box."""
    stats: Stats | None = None
    """Of the last reply."""
    finish_reason: str | None = None
    """Of the last reply: "stop", "length", or "stopped" by the user."""
    error: ApiError | None = None
    """Set if the last question has no reply."""
    _stop: asyncio.Event = field(default_factory=asyncio.Event, repr=False)

    def __deepcopy__(self, _memo: object) -> WebConversation:
        """Gradio copies the initial state for each tab."""
        return WebConversation()

    def resume(self, kept: str | None) -> None:
        """Takes the messages that the page shows, which outlive this server."""
        if not self.replying:
            self.messages, self.settings = parse(kept)

    def take_unanswered(self) -> None:
        """Makes a draft of a last question without a reply, as the page was closed meanwhile."""
        if self.messages and self.messages[-1]["role"] == "user":
            self.draft = self.messages.pop()["content"]

    def stop(self) -> None:
        """Ends the current reply."""
        self._stop.set()

    def undo(self) -> None:
        """Removes the last question and its reply; the question becomes the draft."""
        if self.replying:
            return
        self._reset()
        while self.messages:
            last = self.messages.pop()
            if last["role"] == "user":
                self.draft = last["content"]
                return

    def clear(self) -> None:
        if self.replying:
            return
        self._reset()
        self.messages.clear()

    def ask(
        self, service: Service, settings: PageSettings, text: str
    ) -> AsyncGenerator[list[Message], None]:
        """Yields the messages as the reply to `text` grows. Keeps errors, does not raise them."""
        return self._reply(service, settings, [*self.messages, message("user", text)], text)

    def regenerate(
        self, service: Service, settings: PageSettings
    ) -> AsyncGenerator[list[Message], None]:
        """Replies to the last question again; the old reply stays unless a new one arrives."""
        messages = [*self.messages]
        while messages and messages[-1]["role"] != "user":
            messages.pop()
        return self._reply(service, settings, messages, "")

    def _reset(self) -> None:
        self.draft = ""
        self.stats = self.finish_reason = self.error = None

    async def _reply(
        self, service: Service, settings: PageSettings, messages: list[Message], draft: str
    ) -> AsyncGenerator[list[Message], None]:
        if self.replying or not messages:
            return
        self._reset()
        self._stop.clear()
        self.replying, self.settings = True, asdict(settings)
        reply: Message | None = None
        try:
            yield messages
            async with aclosing(self._growing(service, settings, messages)) as replies:
                async for reply in replies:
                    yield [*messages, reply]
        except ApiError as error:
            self.error = error
        except Exception:  # the page shows it in its language and stays usable
            _log.exception("a reply of the web page failed")
            self.error = ApiError("the server failed; see its log", status=500)
        finally:
            self.replying = False
            if reply is not None:
                self.messages = [*messages, reply]
            else:
                self.draft = draft

    async def _growing(
        self, service: Service, settings: PageSettings, messages: list[Message]
    ) -> AsyncGenerator[Message, None]:
        """The reply as it grows, at most once in INTERVAL."""
        reply, updated = GrowingReply(), 0.0
        async with (
            service.start([build_request(service, settings, messages)]) as replies,
            aclosing(until(self._stop, replies)) as chunks,
        ):
            async for chunk in chunks:
                reply.add(chunk)
                self.stats = chunk.stats or self.stats
                self.finish_reason = chunk.finish_reason or self.finish_reason
                if reply.begun and (time.monotonic() - updated > INTERVAL or chunk.finish_reason):
                    yield reply.message()
                    updated = time.monotonic()
        if self.finish_reason is None:
            self.finish_reason = "stopped"
            if reply.begun:
                yield reply.message()


class GrowingReply:
    """A reply and the thought before it, from their chunks."""

    def __init__(self) -> None:
        self.text = self.thinking = ""
        self._tokens = 0
        self._began = self._ended = 0.0

    @property
    def begun(self) -> bool:
        return bool(self.text or self.thinking)

    def add(self, chunk: Chunk) -> None:
        thinking = len(chunk.tokens) - len(chunk.answer_tokens)
        if thinking or chunk.thinking:
            self._ended = time.monotonic()
            self._began = self._began or self._ended
        self._tokens += thinking
        self.thinking += chunk.thinking
        self.text += chunk.text
        if chunk.stats:
            self._tokens = chunk.stats.thinking_tokens

    def message(self) -> Message:
        """The reply; with a thought also its seconds and tokens."""
        if not self.thinking:
            return message("assistant", self.text)
        return message("assistant", self.text) | {
            "reasoning_content": self.thinking,
            "thought_seconds": round(self._ended - self._began, 1),
            "thought_tokens": self._tokens,
        }


def message(role: str, text: str) -> Message:
    return {"role": role, "content": text}


SAID = ("role", "content", "reasoning_content")
"""What a chat template takes of a message."""


def build_request(
    service: Service, settings: PageSettings, messages: list[Message]
) -> GenerationRequest:
    system = [message("system", settings.system)] if settings.system.strip() else []
    said = [{key: m[key] for key in SAID if key in m} for m in messages]
    prompt = service.chat_prompt([*system, *said], thinking=wanted(settings.think))
    bounded = prompt.thinking and settings.think_tokens is not None
    return GenerationRequest(
        prompt=prompt,
        served=service.find_model(settings.served),
        sampling=service.sampling(
            prompt=prompt, temperature=settings.temperature, top_p=settings.top_p
        ),
        think_tokens=settings.think_tokens if bounded else None,
        max_tokens=settings.max_tokens,
        stop=prompt.stops,
    )


def wanted(think: str) -> Thinking:
    """The thinking that a value of the switch asks for."""
    return Thinking(wanted={"on": True, "off": False}.get(think))


def takes_system(service: Service) -> bool:
    """Whether the model's chat template uses a system message."""
    try:
        with_system = service.chat_prompt([message("system", "x"), message("user", "x")])
        plain = service.chat_prompt([message("user", "x")])
    except ApiError:
        return False
    return with_system != plain


async def until(stopped: asyncio.Event, items: AsyncIterable[T]) -> AsyncGenerator[T, None]:
    """Yields `items` until `stopped` is set."""
    iterator = aiter(items)
    stop = asyncio.ensure_future(stopped.wait())
    following = asyncio.ensure_future(anext(iterator, None))
    try:
        while True:
            await asyncio.wait([stop, following], return_when=asyncio.FIRST_COMPLETED)
            if stop.done() or (item := following.result()) is None:
                return
            yield item
            following = asyncio.ensure_future(anext(iterator, None))
    finally:
        for task in (stop, following):
            task.cancel()
            with suppress(asyncio.CancelledError, ApiError):
                await task
        if isinstance(iterator, AsyncGenerator):
            await iterator.aclose()
