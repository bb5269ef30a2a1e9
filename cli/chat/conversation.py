"""A conversation at the terminal: streams replies, saves turns, loads the model."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import ExitStack, closing, nullcontext
from dataclasses import replace
from threading import Event, Thread
from typing import TYPE_CHECKING

from minicpm_mlx.errors import ContextLengthError, MiniCPMError
from minicpm_mlx.lm.attachments import Files, with_files, without_files
from minicpm_mlx.loading.store import is_kept

from ..options import advise_without_template
from ..render.reply_display import PlainStream, ReplyDisplay, TextWriter
from ..render.spinner import SpinnerStream
from ..render.texts import Texts, gigabytes, printable
from ..render.theme import console
from ..render.thoughts import ThoughtStream
from ..render.wrap import wrapped
from ..streams import shows_progress
from . import keyboard
from .autosave import AutoSave

if TYPE_CHECKING:
    from minicpm_mlx import LM, Card, Chat, Piece, Stats
    from minicpm_mlx.lm.sessions import SavedSession

    from .tools import TerminalTools

LEAVE = ("/exit", "/quit", "/bye")
LEAVE_WORDS = ("exit", "quit", "退出")
"""Leave too where they are all that is typed, as in other programs."""


class Loading:
    """A model that loads while the user types, or at once where nobody does."""

    def __init__(self, load: Callable[[], LM], *, background: bool = True) -> None:
        self._lm: LM | None = None
        self._error: BaseException | None = None
        self._ended = Event()  # after a Ctrl-C, Thread.join would think that the thread had ended
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
        # When a thread ends, MLX frees its streams, and aborts a program that ends at the same
        # moment. So the thread never ends.
        Event().wait()

    @property
    def done(self) -> bool:
        return self._ended.is_set()

    @property
    def failed(self) -> bool:
        return self._error is not None

    def wait(self) -> LM:
        """Returns the model, or raises what loading it raised. Ctrl-C interrupts the wait."""
        while not self._ended.wait(0.1):
            pass
        if self._error is not None:
            raise self._error
        assert self._lm is not None
        return self._lm

    def abandon(self) -> None:
        """Exits at once if the model is still loading.

        A normal exit of Python would stop the thread inside MLX, which aborts.
        """
        exiting = sys.exc_info()[1]
        if not self.done and isinstance(exiting, SystemExit | None):
            sys.stdout.flush()
            os._exit(int(exiting.code or 0) if exiting else 0)


class TerminalChat:
    """One user's conversation: the chat, its name on disk, and the display of replies."""

    def __init__(
        self,
        new_chat: Callable[[LM], Chat],
        loading: Loading,
        texts: Texts,
        *,
        interactive: bool = True,
        markdown: bool = True,
        name: str | None = None,
        saved: SavedSession | None = None,
        changes: Mapping[str, object] | None = None,
        load: Callable[[str], LM] | None = None,
        adapter: bool = True,
        tools: TerminalTools | None = None,
    ) -> None:
        self.load = load
        """Loads another model, with the options of the command line."""
        self.loading = loading
        self.texts = texts
        self.interactive = interactive
        self.markdown = markdown
        self.autosave = AutoSave(name, self.note)
        self.attached: Files = []
        """Files to send with the next message."""
        self.adapter = adapter
        """Whether a resumed session applies its own adapter."""
        self.tools = tools
        """Tools that every model is given, if it can call them."""
        self.broken = False
        """No model could be loaded, or no conversation restored."""
        self.unfinished = False
        """A turn was ended by its bound on calls."""
        self.draft = ""
        """Text that the next prompt starts with."""
        self.editing: Files | None = None
        """Files of the last question, if the next message replaces it."""
        self.question = ""
        """The last message sent, its files included."""
        self.replies: list[Stats] = []
        self.own = {name for name, value in (changes or {}).items() if value is not None}
        """Settings that the user gave, by option or by /set; another model keeps them."""
        self._new_chat = new_chat
        self._saved = saved
        self._changes = changes or {}  # options of the command line override saved ones
        self._chat: Chat | None = None
        self._noted_forgotten = 0
        self._due: list[dict[str, float]] = []  # costs of attending densely, to be told
        if saved:
            self._offer(saved.take_unanswered())

    @property
    def name(self) -> str | None:
        """Name that the conversation is saved under; None: not saved."""
        return self.autosave.name

    @property
    def chat(self) -> Chat:
        """The conversation; waits for the model."""
        if self._chat is None:
            if not self.loading.done and self.interactive:
                self.note("loading")
            try:
                lm, saved = self.loading.wait(), self._saved
                self.use(self._new_chat(lm) if saved is None else self._restored(lm, saved))
            except Exception:
                self.broken = True
                raise
        assert self._chat is not None
        return self._chat

    def use(self, chat: Chat) -> None:
        """Continues with this conversation; limits its context to the free memory."""
        from minicpm_mlx import memory

        self._chat, self._noted_forgotten = chat, chat.forgotten
        if chat.lm.on_dense is not None:  # not while a reply is being shown
            chat.lm.on_dense = lambda: self._due.append(memory.dense_attention(chat.lm.config))
        chat.lm.room = None
        if (chat.think or chat.think_tokens is not None) and chat.lm.tokenizer.thinking is None:
            chat.think = chat.think_tokens = None
            self.note("no_thinking", style="warning")
        if self.tools is not None:
            self._give_tools(chat, self.tools)
        room = max(memory.fitting_context(chat.lm.config, chat.kv_bits), 256)
        if room < chat.context_length:
            chat.lm.room = room
            self.note("bounded", style="warning", context=room)

    def _give_tools(self, chat: Chat, tools: TerminalTools) -> None:
        """Has the model call tools, if it can and there is room to describe them."""
        from minicpm_mlx.lm.tools.tool_set import ToolSet

        chat.tools = tools
        try:
            ToolSet(chat.lm.tokenizer, tools.described)
            count, room = chat.tool_tokens(), chat.context_length
        except MiniCPMError as error:
            chat.tools = None
            self.note("no_tools", style="warning", error=error)
            return
        if count > room * 3 // 4:
            chat.tools = None
            self.note("too_many_tools", style="warning", count=count, all=room)
        elif count > room // 2:
            self.note("many_tools", style="warning", count=count, all=room)

    def ask(self, text: str, edited: Files | None = None) -> None:
        """Answers a message and the files attached to it.

        `edited`: the files of the last question, if the message replaces it. If the reply is
        stopped before its first word, the message becomes the draft of the next prompt.
        """
        self.draft, self.editing = text, edited
        try:
            chat = self.chat
            self.question = with_files([*(edited or ()), *self.attached], text)
            turn = chat.reply if edited is None else chat.edit
            self._save_question(len(chat.messages) if edited is None else chat.last_question())
            with advise_without_template("continue plain text: minicpm-mlx generate --raw"):
                replied = self.show(turn(self.question))
        except Exception:
            self.draft, self.editing = "", None
            raise
        if replied:
            self.draft, self.editing = "", None
            self.attached.clear()

    def show(self, pieces: Generator[Piece, None, None]) -> bool:
        """Streams a reply and saves; Ctrl-C stops it. Returns whether any text came, or thought."""
        last: Piece | None = None
        replied, count, calls = False, 0, 0
        stream: ReplyDisplay | None = self._display()
        with keyboard.one_interrupt() if self.interactive else nullcontext(), ExitStack() as stack:
            stack.callback(self.save)  # even if the terminal has gone and writing to it fails
            try:
                with closing(pieces):
                    for piece in pieces:
                        if stream is None:
                            stream, calls = self._display(), 0
                        stream.feed(piece)
                        calls += len(piece.tool_calls)
                        if piece.finish_reason:  # a call may be asked for now
                            stream.close()
                            stream = None
                        last = piece
                        replied |= bool(piece.text or piece.thinking or piece.tool_calls)
                        count += len(piece.token_ids)
            except KeyboardInterrupt:
                if not self.interactive:
                    raise
                last, calls = None, 0
            finally:
                if stream is not None:
                    stream.close()
        while self._due:
            self.note("dense", style="warning", **self._due.pop())
        if calls:
            self.unfinished = True
            key = "many_calls" if self.interactive else "many_calls_asked"
            self.note(key, style="warning", count=self.chat.max_rounds)
        if self.interactive:
            self._conclude(last, count)
        elif last and last.in_thought:
            self.note("no_answer", style="warning")
        return replied

    def save(self) -> None:
        """Saves the conversation; reports a failure once."""
        if self._chat is not None:
            self.autosave.save(self._chat)

    def save_cache(self) -> None:
        """Saves the KV cache too, so that resuming needs no prefill."""
        if self._chat is not None:
            self.autosave.save_cache(self._chat)

    def resume(self, saved: SavedSession) -> None:
        """Resumes a saved conversation with the model that is loaded."""
        question = saved.take_unanswered()
        self.use(self._restored(self.chat.lm, saved))
        self.drop_draft()
        self._offer(question)
        self.note_resumed(saved)

    def drop_draft(self) -> None:
        """Forgets draft and attached files, as another conversation begins."""
        self.attached, self.draft, self.editing = [], "", None

    def overflow(self, error: ContextLengthError) -> None:
        """Says what did not fit, and what would help."""
        chat = self.chat
        room = chat.context_length - 1
        total, message = chat.alone(self.question), chat.alone(self.question, system=False)
        if message > room:
            self.note("alone", style="error", count=message, room=room)
            if self.attached:
                self.note("drop", style="warning")
            return
        if total > room:
            system = chat.system_tokens()
            self.note("long_system", style="error", system=system, count=total, room=room)
            return
        self.print(str(error), style="error")
        self.note("full" if chat.on_overflow == "stop" else "full_slides", style="warning")

    def note_resumed(self, saved: SavedSession) -> None:
        messages = self.texts.count("message", len(saved.messages))
        self.note("resumed", name=saved.name, messages=messages)

    def note(self, key: str, *, style: str = "quiet", **values: object) -> None:
        """Prints an interface text."""
        self.print(self.texts(key, **values), style=style)

    def print(self, text: str, style: str = "quiet", *, cut: bool = False) -> None:
        """Prints lines without control characters; `cut`: to the terminal's width."""
        out = console(stderr=not self.interactive)
        text = printable(text)
        if not cut:  # rich would break Chinese at spaces alone
            text = wrapped(text, out.width - 1)
        out.print(text, style=style, no_wrap=cut, overflow="ellipsis" if cut else None)

    def _offer(self, question: str) -> None:
        """Makes a draft of a question that was never answered, as the program was killed."""
        if self.interactive and question:
            self.attached, self.draft = without_files(question)

    def _save_question(self, index: int) -> None:
        """Saves with the question as message `index`, in case the program is killed meanwhile."""
        chat = self.chat
        messages = chat.messages
        chat.messages = [*messages[:index], {"role": "user", "content": self.question}]
        try:
            self.save()
        finally:
            chat.messages = messages

    def _restored(self, lm: LM, saved: SavedSession) -> Chat:
        from minicpm_mlx.lm import sessions
        from minicpm_mlx.lm.fingerprint import fingerprint
        from minicpm_mlx.lm.session_cache import restore_cache

        if self.adapter and saved.adapter != (lm.adapter and str(lm.adapter)):
            try:
                lm.use_adapter(saved.adapter)
            except MiniCPMError as error:
                self.note("no_longer", style="warning", error=error)
        chat = sessions.restore(saved, lm, **self._changes)
        reason = restore_cache(chat, saved.name)
        if saved.identity != fingerprint(lm):
            self.note("other", model=saved.model)
        elif reason is not None and chat.messages:
            self.note("rereads")
        # Only now, so as not to overwrite a conversation that cannot be restored.
        self.autosave.follow(saved, chat)
        return chat

    def _display(self) -> ReplyDisplay:
        """Shows the thought where somebody looks; the answer alone goes into a pipe."""
        shown = self.interactive or shows_progress()
        return ReplyDisplay(
            self._answer_stream,
            (lambda: self.thought_stream(lasting=not self.interactive)) if shown else None,
            lambda seconds, tokens: self.print(self.texts.thought(seconds, tokens)),
        )

    def thought_stream(self, *, lasting: bool) -> ThoughtStream:
        return ThoughtStream(console(stderr=not self.interactive), lasting=lasting)

    def _answer_stream(self) -> TextWriter:
        if not (self.interactive and self.markdown):
            return PlainStream(safe=self.interactive)
        return SpinnerStream(lambda seconds: self.texts("waiting", seconds=seconds))

    def _conclude(self, last: Piece | None, count: int) -> None:
        """Prints the statistics under a reply, and notes on the context."""
        if last is None or last.stats is None:
            tokens = f" · {self.texts.count('token', count)}" if count else ""
            self.print(self.texts("stopped") + tokens)
        else:
            self.replies.append(last.stats)
            self.print(self.summary(last.stats))
            if last.finish_reason == "length":
                full = last.stats.prompt_tokens + last.stats.completion_tokens
                if full >= self.chat.context_length:
                    slides = self.chat.on_overflow == "slide"
                    self.note("filled" if slides else "full", style="warning")
                elif not last.in_thought:
                    self.note("cut", style="warning", limit=self.chat.max_tokens)
            if last.in_thought:
                cut = last.finish_reason == "length"
                self.note("ended_thinking" if cut else "never_answered", style="warning")
        if self.chat.forgotten > self._noted_forgotten:
            self.note("slid", style="warning", count=self.chat.forgotten)
            self._noted_forgotten = self.chat.forgotten
        self.print("")

    def summary(self, stats: Stats) -> str:
        texts, count = self.texts, stats.completion_tokens
        used = stats.prompt_tokens + count
        parts = [
            texts.count("token", count),
            texts("speed", speed=stats.decode_tps) if count > 1 else "",
            texts("first", seconds=stats.ttft),
            texts("context", used=used, all=self.chat.context_length),
            texts("memory", size=stats.peak_memory / 1e9, unit="GB"),
        ]
        return " · ".join(part for part in parts if part)


def is_here(card: Card) -> bool:
    """Whether the model needs no download."""
    return is_kept(card) or is_kept(replace(card, bits=None, group_size=None))


def offer(card: Card, texts: Texts) -> Iterator[str]:
    """Lines on a download: its size, whether it fits, the speed; errors as of `forecast`."""
    from minicpm_mlx.bench.forecast import forecast

    found = forecast(card)
    yield texts("absent", model=card.name, gb=gigabytes(found.download))
    memory, free = (f"{size / 1e9:.1f}" for size in (found.memory, found.available))
    speed = f"{found.speed:.2g}" if found.speed < 10 else f"{found.speed:.0f}"
    yield texts("fits" if found.fits else "too_big", memory=memory, free=free, speed=speed)
