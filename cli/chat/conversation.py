"""A conversation at the terminal: what is shown of a reply, what is kept of it, which model."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Generator, Mapping
from contextlib import ExitStack, closing, nullcontext
from threading import Event, Thread
from typing import TYPE_CHECKING, Any

from ..render.texts import Texts
from ..render.theme import console
from . import keyboard
from .autosave import AutoSave

if TYPE_CHECKING:
    from minicpm_mlx import LM, Card, Chat, Piece, Stats
    from minicpm_mlx.errors import ContextLengthError
    from minicpm_mlx.lm.attachments import Files
    from minicpm_mlx.lm.sessions import SavedSession

    from ..render.spinner import Waiting


LEAVE = ("/exit", "/quit")

CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
NO_TEXT = re.compile(r"[\ud800-\udfff]")
"""A byte of a file's name that is no UTF-8, as Python reads it; printing it would fail."""


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
            Thread(target=self._run_and_stay, args=(load,), daemon=True).start()
        else:
            self._run(load)

    def _run(self, load: Callable[[], LM]) -> None:
        try:
            self._lm = load()
        except BaseException as error:
            self._error = error
        self._ended.set()

    def _run_and_stay(self, load: Callable[[], LM]) -> None:
        self._run(load)
        # MLX takes down what it made for a thread when that ends, and aborts a program that ends at
        # the same moment: so the thread stays.
        Event().wait()

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


class TerminalChat:
    """One user's conversation: the chat, its name on disk, and how replies are shown."""

    def __init__(
        self,
        chat: Callable[[LM], Chat],
        loading: Loading,
        say: Texts,
        *,
        interactive: bool = True,
        markdown: bool = True,
        name: str | None = None,
        saved: SavedSession | None = None,
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
        self.keeper = AutoSave(name, self.note)
        self.attached: Files = []
        """Files that go with the next message."""
        self.adapter = adapter
        """Whether sessions bring their adapters along."""
        self.broken = False
        """There is no model to talk with, or no conversation to go on with."""
        self.draft = ""
        """What the next prompt begins with."""
        self.editing: Files | None = None
        """The files of the last question, where the next message is to take its place."""
        self.asked = ""
        """The last message sent, its files included."""
        self.replies: list[Stats] = []
        self._make = chat
        self._saved = saved
        self._changes = changes or {}  # what the command line wants otherwise than saved
        self._chat: Chat | None = None
        self._told = 0
        if saved:
            self._offer(saved.take_unanswered())

    @property
    def name(self) -> str | None:
        """Under which the conversation is saved; None: not at all."""
        return self.keeper.name

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

    def ask(self, text: str, edited: Files | None = None) -> None:
        """Answer a message of the user's, with the files attached to it; `edited`: those of the
        last question, whose place it takes. Until a word of the answer has come, it is the draft
        of the next prompt."""
        from minicpm_mlx.lm.attachments import with_files

        self.draft, self.editing = text, edited
        try:
            chat = self.chat
            self.asked = with_files([*(edited or ()), *self.attached], text)
            turn = chat.reply if edited is None else chat.edit
            self._keep_question(len(chat.messages) if edited is None else chat.last_question())
            said = self.show(turn(self.asked))
        except Exception:
            self.draft, self.editing = "", None
            raise
        if said:
            self.draft, self.editing = "", None
            self.attached.clear()

    def show(self, pieces: Generator[Piece, None, None]) -> bool:
        """Stream a reply and save; Ctrl-C breaks it off, and what came stays. Whether any did."""
        last: Piece | None = None
        said, count = False, 0
        stream = self._stream()
        with keyboard.one_interrupt() if self.interactive else nullcontext(), ExitStack() as at_end:
            at_end.callback(self.save)  # also where the terminal has gone and writing to it fails
            try:
                with closing(stream), closing(pieces):
                    for piece in pieces:
                        stream.feed(piece.text)
                        last, said = piece, said or bool(piece.text)
                        count += len(piece.token_ids)
            except KeyboardInterrupt:
                if not self.interactive:
                    raise
        if self.interactive:
            self._conclude(last, count)
        return said

    def save(self) -> None:
        """Keep the conversation; where that fails, say so once and go on."""
        if self._chat is not None:
            self.keeper.save(self._chat)

    def keep_cache(self) -> None:
        """Keep the key-value cache as well, so that going on later reads nothing again."""
        if self._chat is not None:
            self.keeper.keep_cache(self._chat)

    def resume(self, saved: SavedSession) -> None:
        """Go on with a saved conversation, with the model that is loaded."""
        question = saved.take_unanswered()
        self.use(self._restored(self.chat.lm, saved))
        self.drop_draft()
        self._offer(question)
        self.note(
            "resumed", name=saved.name, messages=self.say.some("message", len(saved.messages))
        )

    def drop_draft(self) -> None:
        """Forget what was to go with the next message: another conversation begins."""
        self.attached, self.draft, self.editing = [], "", None

    def overflow(self, error: ContextLengthError) -> None:
        """Say what did not fit, and what would help."""
        chat = self.chat
        alone, room = chat.alone(self.asked), chat.context_length - 1
        if alone > room:
            self.note("alone", style="error", count=alone, room=room)
            if self.attached:
                self.note("drop", style="warning")
            return
        self.print(str(error), style="error")
        self.note("full" if chat.on_overflow == "stop" else "full_slides", style="warning")

    def note(self, key: str, *, style: str = "quiet", **values: object) -> None:
        """A line of the program's own, apart from what the model says."""
        self.print(self.say(key, **values), style=style)

    def print(self, text: str, style: str = "quiet", *, cut: bool = False) -> None:
        """Lines of our own; `cut`: to the terminal's width."""
        text = CONTROLS.sub("", NO_TEXT.sub("\ufffd", text))
        out = console(stderr=not self.interactive)
        out.print(text, style=style, no_wrap=cut, overflow="ellipsis" if cut else None)

    def _offer(self, question: str) -> None:
        """Make a draft of a question that the program was killed over."""
        from minicpm_mlx.lm.attachments import without_files

        if self.interactive and question:
            self.attached, self.draft = without_files(question)

    def _keep_question(self, at: int) -> None:
        """Save with the question as message `at`, so that a program killed meanwhile has it."""
        chat = self.chat
        messages = chat.messages
        chat.messages = [*messages[:at], {"role": "user", "content": self.asked}]
        try:
            self.save()
        finally:
            chat.messages = messages

    def _restored(self, lm: LM, saved: SavedSession) -> Chat:
        from minicpm_mlx.errors import MiniCPMError
        from minicpm_mlx.lm import sessions
        from minicpm_mlx.lm.fingerprint import identity
        from minicpm_mlx.lm.session_cache import restore_cache

        if self.adapter and saved.adapter != (lm.adapter and str(lm.adapter)):
            try:
                lm.use_adapter(saved.adapter)
            except MiniCPMError as error:
                self.note("no_longer", style="warning", error=error)
        chat = sessions.restore(saved, lm, **self._changes)
        reason = restore_cache(chat, saved.name)
        if saved.identity != identity(lm):
            self.note("other", model=saved.model)
        elif reason is not None and chat.messages:
            self.note("rereads")
        self.keeper.follow(saved, chat)  # only now: what cannot be restored is not written over
        return chat

    def _stream(self) -> Waiting | PlainStream:
        """What a reply is written to."""
        if not (self.interactive and self.markdown):
            return PlainStream(safe=self.interactive)
        from ..render.spinner import Waiting

        return Waiting(lambda seconds: self.say("waiting", seconds=seconds))

    def _conclude(self, last: Piece | None, count: int) -> None:
        """The quiet line under a reply, and what else the user should know."""
        if last is None or last.stats is None:
            came = f" · {self.say.some('token', count)}" if count else ""
            self.print(self.say("stopped") + came)
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
            say.some("token", count),
            say("speed", speed=stats.decode_tps) if count > 1 else "",
            say("first", seconds=stats.ttft),
            say("context", used=used, all=self.chat.context_length),
            say("memory", gb=stats.peak_memory / 1e9),
        ]
        return " · ".join(part for part in parts if part)


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
    from minicpm_mlx.loading.store import kept_folder

    whole = replace(card, bits=None, group_size=None)
    return kept_folder(card) is not None or kept_folder(whole) is not None
