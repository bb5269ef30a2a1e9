"""A conversation at the terminal: what is shown of a reply, what is kept of it, which model."""

from __future__ import annotations

import os
import re
import signal
import sys
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager, nullcontext, suppress
from threading import Event, Thread
from typing import TYPE_CHECKING, Any

from .theme import console
from .words import Words

if TYPE_CHECKING:
    from minicpm_mlx import LM, Card, Chat, Piece, Stats
    from minicpm_mlx.sessions import Saved

    from .markdown import MarkdownStream


LEAVE = ("/exit", "/quit")

CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class PlainStream:
    """Writes a reply as it comes; `safe`: without what would move a terminal's cursor."""

    def __init__(self, *, safe: bool) -> None:
        self.safe = safe
        self.begun = False

    def feed(self, text: str) -> None:
        self.begun = True
        if self.safe:
            text = CONTROLS.sub("", text)
        sys.stdout.write(text)
        sys.stdout.flush()

    def close(self) -> None:
        if self.begun:
            print(flush=True)


class Loading:
    """A model that loads while the user types, or at once where nobody does."""

    def __init__(self, load: Callable[[], LM], *, background: bool = True) -> None:
        self._lm: LM | None = None
        self._error: BaseException | None = None
        self._ended = Event()  # Thread.join would take a Ctrl-C for the thread's end
        if background:
            Thread(target=self._run, args=(load,), daemon=True).start()
        else:
            self._run(load)

    def _run(self, load: Callable[[], LM]) -> None:
        try:
            self._lm = load()
        except BaseException as error:
            self._error = error
        self._ended.set()

    @property
    def done(self) -> bool:
        return self._ended.is_set()

    @property
    def failed(self) -> bool:
        return self._error is not None

    def wait(self) -> LM:
        """The model; raises what loading it raised. Ctrl-C is heard meanwhile."""
        while not self._ended.wait(0.1):
            pass
        if self._error is not None:
            raise self._error
        assert self._lm is not None
        return self._lm

    def abandon(self) -> None:
        """Leave the program if the model still loads: Python's own end would stop the thread inside
        MLX, which aborts."""
        leaving = sys.exc_info()[1]
        if not self.done and isinstance(leaving, SystemExit | None):
            sys.stdout.flush()
            os._exit(int(leaving.code or 0) if leaving else 0)


class Talk:
    """One user's conversation: the chat, its name on disk, and how replies are shown."""

    def __init__(
        self,
        chat: Callable[[LM], Chat],
        loading: Loading,
        say: Words,
        *,
        interactive: bool = True,
        markdown: bool = True,
        name: str | None = None,
        saved: Saved | None = None,
        changes: Mapping[str, object] | None = None,
        load: Callable[[str], LM] | None = None,
        adapter: bool = True,
    ) -> None:
        self.load = load
        """Loads another model, as the command line asked for the first."""
        self.loading = loading
        self.say = say
        self.interactive = interactive
        self.markdown = markdown
        self.name = name
        """Under which the conversation is saved; None: not at all."""
        self.attached: list[tuple[str, str]] = []
        """Files that go with the next message: name, text."""
        self.adapter = adapter
        """Whether sessions bring their adapters along."""
        self.broken = False
        """There is no model to talk with, or no conversation to go on with."""
        self.draft = ""
        """What the next prompt begins with."""
        self.replies: list[Stats] = []
        self._make = chat
        self._saved = saved
        self._changes = changes or {}  # what the command line wants otherwise than saved
        self._chat: Chat | None = None
        self._told = 0
        self._warned = False  # that saving fails

    @property
    def chat(self) -> Chat:
        """The conversation; waits for the model."""
        if self._chat is None:
            if not self.loading.done and self.interactive:
                self.note("loading")
            try:
                lm, saved = self.loading.wait(), self._saved
                self.use(self._make(lm) if saved is None else self._restored(lm, saved))
            except Exception:
                self.broken = True
                raise
        assert self._chat is not None
        return self._chat

    def use(self, chat: Chat) -> None:
        """Go on with this conversation, no longer than memory has room for."""
        from minicpm_mlx import memory

        self._chat, self._told = chat, chat.forgotten
        chat.lm.room = None
        room = max(memory.fitting_context(chat.lm.config, chat.kv_bits), 256)
        if room < chat.context_length:
            chat.lm.room = room
            self.note("bounded", style="warning", context=room)

    def ask(self, text: str) -> None:
        """Answer a message of the user's, with the files attached to it."""
        files = "".join(f"{name}:\n```\n{body}\n```\n\n" for name, body in self.attached)
        self.show(self.chat.reply(files + text))
        self.attached.clear()

    def show(self, pieces: Generator[Piece, None, None]) -> None:
        """Stream a reply and save; Ctrl-C breaks it off, and what came stays."""
        last: Piece | None = None
        stream = self._stream()
        with _undisturbed() if self.interactive else nullcontext(), ExitStack() as at_end:
            at_end.callback(self.save)  # also where the terminal has gone and writing to it fails
            try:
                with closing(stream), closing(pieces):
                    for piece in pieces:
                        stream.feed(piece.text)
                        last = piece
            except KeyboardInterrupt:
                if not self.interactive:
                    raise
        if self.interactive:
            self._conclude(last)

    def save(self) -> None:
        """Keep the conversation; where that fails, say so once and go on."""
        from minicpm_mlx import sessions

        if self.name is None or self._chat is None:
            return
        if self._chat.messages or sessions.path_of(self.name).exists():
            self._keep(sessions.save)

    def keep_cache(self) -> None:
        """Keep the key-value cache as well, so that going on later reads nothing again."""
        from minicpm_mlx import sessions

        if self._chat is not None and self._chat.messages and self._chat.session.ids:
            self._keep(sessions.save_cache)

    def resume(self, saved: Saved) -> None:
        """Go on with a saved conversation, with the model that is loaded."""
        self.use(self._restored(self.chat.lm, saved))
        self.name = saved.name  # only now: what cannot be restored must not be written over
        self.note("resumed", name=saved.name, count=len(saved.messages))

    def note(self, key: str, *, style: str = "quiet", **values: object) -> None:
        """A line of the program's own, apart from what the model says."""
        self.print(self.say(key, **values), style=style)

    def print(self, text: str, style: str = "quiet") -> None:
        console(stderr=not self.interactive).print(text, style=style)

    def _restored(self, lm: LM, saved: Saved) -> Chat:
        from minicpm_mlx import sessions
        from minicpm_mlx.errors import MiniCPMError

        if self.adapter and saved.adapter != (lm.adapter and str(lm.adapter)):
            try:
                lm.use_adapter(saved.adapter)
            except MiniCPMError as error:
                self.note("no_longer", style="warning", error=error)
        chat = sessions.restore(saved, lm, **self._changes)
        reason = sessions.restore_cache(chat, saved.name)
        if saved.identity != sessions.identity(lm):
            self.note("other", model=saved.model)
        elif reason is not None and chat.messages:
            self.note("rereads")
        return chat

    def _keep(self, write: Callable[[Chat, str], object]) -> None:
        from minicpm_mlx.errors import SessionError

        if self.name is None or self._chat is None:
            return
        try:
            write(self._chat, self.name)
            self._warned = False
        except SessionError as error:
            if not self._warned:
                self.note("unsaved", style="warning", error=error)
            self._warned = True

    def _stream(self) -> MarkdownStream | PlainStream:
        """What a reply is written to."""
        if not (self.interactive and self.markdown):
            return PlainStream(safe=self.interactive)
        from .markdown import MarkdownStream

        return MarkdownStream(console())

    def _conclude(self, last: Piece | None) -> None:
        """The quiet line under a reply, and what else the user should know."""
        if last is None or last.stats is None:
            self.note("stopped")
        else:
            self.replies.append(last.stats)
            self.print(self.summary(last.stats))
            if last.finish_reason == "length":
                full = last.stats.prompt_tokens + last.stats.completion_tokens
                if full >= self.chat.context_length:
                    slides = self.chat.on_overflow == "slide"
                    self.note("filled" if slides else "full", style="warning")
                else:
                    self.note("cut", style="warning", limit=self.chat.max_tokens)
        if self.chat.forgotten > self._told:
            self.note("slid", style="warning", count=self.chat.forgotten)
            self._told = self.chat.forgotten
        self.print("")

    def summary(self, stats: Stats) -> str:
        say, count = self.say, stats.completion_tokens
        used = stats.prompt_tokens + count
        parts = [
            say("token" if count == 1 else "tokens", count=count),
            say("speed", speed=stats.decode_tps) if count > 1 else "",
            say("first", seconds=stats.ttft),
            say("context", used=used, all=self.chat.context_length),
            say("memory", gb=stats.peak_memory / 1e9),
        ]
        return " · ".join(part for part in parts if part)


@contextmanager
def _undisturbed() -> Iterator[None]:
    """While a reply comes: keys typed ahead are not echoed into it, and only the first Ctrl-C
    counts, since the reply is then being brought to its end."""

    def interrupt(*_: object) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        with _no_echo():
            yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def _no_echo() -> Iterator[None]:
    import termios  # not on Windows, where nothing here runs

    if not sys.stdin.isatty():
        yield
        return
    shown = termios.tcgetattr(sys.stdin)
    quiet = termios.tcgetattr(sys.stdin)
    quiet[3] &= ~termios.ECHO
    termios.tcsetattr(sys.stdin, termios.TCSANOW, quiet)
    try:
        yield
    finally:
        with suppress(termios.error):  # the terminal has gone
            termios.tcsetattr(sys.stdin, termios.TCSANOW, shown)


CHAT_SETTINGS = ("max_tokens", "context", "on_overflow", "kv_bits")


def settings(chat: Chat) -> dict[str, Any]:
    """What /set changes, by name."""
    from dataclasses import asdict

    how = chat.lm.sampling if chat.sampling is None else chat.sampling
    return asdict(how) | {name: getattr(chat, name) for name in CHAT_SETTINGS}


def is_here(card: Card) -> bool:
    """Whether the model needs no download."""
    from dataclasses import replace

    if card.repo is None:
        return True
    from minicpm_mlx.local import kept_folder

    whole = replace(card, bits=None, group_size=None)
    return kept_folder(card) is not None or kept_folder(whole) is not None
