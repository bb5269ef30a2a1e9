"""A conversation of the page with the service; nothing here knows how it is drawn."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

from minicpm_mlx.server.http.api_error import ApiError

if TYPE_CHECKING:
    from minicpm_mlx.lm.outputs import Stats
    from minicpm_mlx.server.service import GenerationRequest, Service

T = TypeVar("T")

_log = logging.getLogger(__name__)

INTERVAL = 0.05
"""Seconds between two drawings of a growing reply: more often is not seen, and costs."""


@dataclass(frozen=True, kw_only=True)
class PageSettings:
    """What the page's controls say."""

    served: str
    system: str
    top_p: float | None
    temperature: float | None
    """None: the model's own."""
    max_tokens: int | None
    """None: as far as the context goes."""


@dataclass(eq=False)
class WebConversation:
    """What one tab has said so far, and what became of its last question."""

    messages: list[dict[str, str]] = field(default_factory=list)
    replying: bool = False
    draft: str = ""
    """A question that came to nothing, to be put back where it was typed."""
    stats: Stats | None = None
    """What the last reply cost."""
    finish_reason: str | None = None
    """How it ended: "stop", "length", or "stopped" by the user."""
    trouble: ApiError | None = None
    """Why there is none."""
    _stop: asyncio.Event = field(default_factory=asyncio.Event, repr=False)

    def __deepcopy__(self, _memo: object) -> WebConversation:
        """Each tab begins with a new one."""
        return WebConversation()

    def stop(self) -> None:
        """End the reply that is coming."""
        self._stop.set()

    def undo(self) -> None:
        """Take the last question and its answer back; the question is the draft then."""
        if self.replying:
            return
        self._settle()
        while self.messages:
            message = self.messages.pop()
            if message["role"] == "user":
                self.draft = message["content"]
                return

    def clear(self) -> None:
        """Begin anew."""
        if self.replying:
            return
        self._settle()
        self.messages.clear()

    def ask(
        self, service: Service, settings: PageSettings, text: str
    ) -> AsyncGenerator[list[dict[str, str]], None]:
        """Answer `text`; the messages as they grow. Trouble is kept, not raised."""
        return self._reply(service, settings, [*self.messages, said("user", text)], text)

    def regenerate(
        self, service: Service, settings: PageSettings
    ) -> AsyncGenerator[list[dict[str, str]], None]:
        """Answer the last question anew; the old answer stays unless a new one comes."""
        asked = [*self.messages]
        while asked and asked[-1]["role"] != "user":
            asked.pop()
        return self._reply(service, settings, asked, "")

    def _settle(self) -> None:
        self.draft = ""
        self.stats = self.finish_reason = self.trouble = None

    async def _reply(
        self, service: Service, settings: PageSettings, asked: list[dict[str, str]], draft: str
    ) -> AsyncGenerator[list[dict[str, str]], None]:
        if self.replying or not asked:
            return
        self._settle()
        self._stop.clear()
        self.replying = True
        text = ""
        try:
            yield asked
            async with aclosing(self._texts(service, settings, asked)) as texts:
                async for text in texts:
                    yield [*asked, said("assistant", text)]
        except ApiError as refusal:
            self.trouble = refusal
        except Exception:  # the page is told so, in its language, and may be used further
            _log.exception("a reply of the web page failed")
            self.trouble = ApiError(500, "the server failed; see its log")
        finally:
            self.replying = False
            if text:
                self.messages = [*asked, said("assistant", text)]
            else:
                self.draft = draft

    async def _texts(
        self, service: Service, settings: PageSettings, asked: list[dict[str, str]]
    ) -> AsyncGenerator[str, None]:
        """The reply's text as it grows, not more often than it is worth drawing."""
        text, drawn = "", 0.0
        async with (
            service.start([question(service, settings, asked)]) as replies,
            aclosing(until(self._stop, replies)) as parts,
        ):
            async for part in parts:
                text += part.text
                self.stats = part.stats or self.stats
                self.finish_reason = part.finish_reason or self.finish_reason
                if text and (time.monotonic() - drawn > INTERVAL or part.finish_reason):
                    yield text
                    drawn = time.monotonic()
        if self.finish_reason is None:
            self.finish_reason = "stopped"
            if text:
                yield text


def said(role: str, text: str) -> dict[str, str]:
    return {"role": role, "content": text}


def question(
    service: Service, settings: PageSettings, asked: list[dict[str, str]]
) -> GenerationRequest:
    """What is asked of the service; ApiError for what it cannot do."""
    from minicpm_mlx.server.service import GenerationRequest

    system = [said("system", settings.system)] if settings.system.strip() else []
    prompt, stop = service.conversation([*system, *asked])
    return GenerationRequest(
        prompt=prompt,
        served=service.served(settings.served),
        sampling=service.sampling(temperature=settings.temperature, top_p=settings.top_p),
        max_tokens=settings.max_tokens,
        stop=stop,
    )


def takes_system(service: Service) -> bool:
    """Whether the model's template has a place for a system text."""
    try:
        told, _ = service.conversation([said("system", "x"), said("user", "x")])
        plain, _ = service.conversation([said("user", "x")])
    except ApiError:
        return False
    return told != plain


async def until(stopped: asyncio.Event, items: AsyncIterable[T]) -> AsyncGenerator[T, None]:
    """`items`, until `stopped` is set."""
    iterator = aiter(items)
    waiting = asyncio.ensure_future(stopped.wait())
    following = asyncio.ensure_future(_following(iterator))
    try:
        while True:
            await asyncio.wait([waiting, following], return_when=asyncio.FIRST_COMPLETED)
            if waiting.done() or (found := following.result()) is None:
                return
            yield found[0]
            following = asyncio.ensure_future(_following(iterator))
    finally:
        for one in (waiting, following):
            one.cancel()
            with suppress(asyncio.CancelledError, ApiError):
                await one
        if isinstance(iterator, AsyncGenerator):
            await iterator.aclose()


async def _following(iterator: AsyncIterator[T]) -> tuple[T] | None:
    try:
        return (await anext(iterator),)
    except StopAsyncIteration:
        return None
