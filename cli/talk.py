"""A conversation at the terminal: what is shown of a reply, what is kept of it, which model."""

from __future__ import annotations

import re
import signal
import sys
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any

from .theme import console
from .words import Words

if TYPE_CHECKING:
    from minicpm_mlx import LM, Chat, Piece, Stats
    from minicpm_mlx.sessions import Saved

    from .markdown import MarkdownStream


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
    """A model that loads while the user types."""

    def __init__(self, load: Callable[[], LM]) -> None:
        self._lm: LM | None = None
        self._error: BaseException | None = None
        self._thread = Thread(target=self._run, args=(load,), daemon=True)
        self._thread.start()

    def _run(self, load: Callable[[], LM]) -> None:
        try:
            self._lm = load()
        except BaseException as error:
            self._error = error

    @property
    def done(self) -> bool:
        return not self._thread.is_alive()

    @property
    def failed(self) -> bool:
        return self._error is not None

    def wait(self) -> LM:
        """The model; raises what loading it raised. Ctrl-C is heard meanwhile."""
        while self._thread.is_alive():
            self._thread.join(0.1)
        if self._error is not None:
            raise self._error
        assert self._lm is not None
        return self._lm


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
    ) -> None:
        self.loading = loading
        self.say = say
        self.interactive = interactive
        self.markdown = markdown
        self.name = name
        """Under which the conversation is saved; None: not at all."""
        self.attached: list[tuple[str, str]] = []
        """Files that go with the next message: name, text."""
        self.draft = ""
        """What the next prompt begins with."""
        self.replies: list[Stats] = []
        self._make = chat
        self._saved = saved
        self._changes = changes or {}  # what the command line wants otherwise than saved
        self._chat: Chat | None = None
        self._told = 0

    @property
    def chat(self) -> Chat:
        """The conversation; waits for the model."""
        if self._chat is None:
            if not self.loading.done and self.interactive:
                self.note("loading", model="")
            lm = self.loading.wait()
            self._chat = self._make(lm) if self._saved is None else self._restored(lm, self._saved)
        return self._chat

    def use(self, chat: Chat) -> None:
        """Go on with another conversation."""
        self._chat, self._told = chat, chat.forgotten

    def ask(self, text: str) -> None:
        """Answer a message of the user's, with the files attached to it."""
        files = "".join(f"{name}:\n```\n{body}\n```\n\n" for name, body in self.attached)
        self.show(self.chat.reply(files + text))
        self.attached.clear()

    def show(self, pieces: Generator[Piece, None, None]) -> None:
        """Stream a reply and save; Ctrl-C breaks it off, and what came stays."""
        last: Piece | None = None
        stream = self._stream()
        with _undisturbed() if self.interactive else nullcontext():
            try:
                with closing(pieces):
                    for piece in pieces:
                        stream.feed(piece.text)
                        last = piece
            except KeyboardInterrupt:
                if not self.interactive:
                    raise
            finally:
                stream.close()
                self.save()
        if self.interactive:
            self._conclude(last)

    def save(self) -> None:
        """Keep the conversation; where that fails, say so and go on."""
        from minicpm_mlx import sessions
        from minicpm_mlx.errors import SessionError

        if self.name is None or self._chat is None or not self._chat.messages:
            return
        try:
            sessions.save(self._chat, self.name)
        except SessionError as error:
            self.note("unsaved", style="warning", error=error)

    def keep_cache(self) -> None:
        """Keep the key-value cache as well, so that going on later reads nothing again."""
        from minicpm_mlx import sessions
        from minicpm_mlx.errors import SessionError

        if self.name is None or self._chat is None or not self._chat.session.ids:
            return
        try:
            sessions.save_cache(self._chat, self.name)
        except SessionError as error:
            self.note("unsaved", style="warning", error=error)

    def resume(self, saved: Saved) -> None:
        """Go on with a saved conversation, with the model that is loaded."""
        self.name = saved.name
        self.use(self._restored(self.chat.lm, saved))

    def note(self, key: str, *, style: str = "quiet", **values: object) -> None:
        """A line of the program's own, apart from what the model says."""
        self.print(self.say(key, **values), style=style)

    def print(self, text: str, style: str = "quiet") -> None:
        console(stderr=not self.interactive).print(text, style=style)

    def _restored(self, lm: LM, saved: Saved) -> Chat:
        from minicpm_mlx import sessions

        chat = sessions.restore(saved, lm, **self._changes)
        reason = sessions.restore_cache(chat, saved.name)
        self._told = chat.forgotten
        self.note("resumed", name=saved.name, count=len(chat.messages))
        if reason is not None and chat.messages:
            self.note("rereads", reason=reason)
        return chat

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
                    self.note("full", style="warning")
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
        termios.tcsetattr(sys.stdin, termios.TCSANOW, shown)


def read_text(path: Path) -> str:
    """A text file the user attaches."""
    from minicpm_mlx.errors import InvalidArgumentError

    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise InvalidArgumentError(f"{path}: not a text file in UTF-8") from None
    except OSError as error:
        raise InvalidArgumentError(f"{path}: {error.strerror or error}") from None


def settings(chat: Chat) -> dict[str, Any]:
    """What /set changes, by name."""
    from dataclasses import asdict

    how = chat.lm.sampling if chat.sampling is None else chat.sampling
    names = ("max_tokens", "context", "on_overflow", "kv_bits")
    return asdict(how) | {name: getattr(chat, name) for name in names}
