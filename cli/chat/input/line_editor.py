"""The line the user types on: history, completion, several lines, an editor."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from prompt_toolkit import Application, PromptSession
from prompt_toolkit.buffer import Buffer
from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.filters import Condition, is_searching
from prompt_toolkit.formatted_text import FormattedText
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.search import accept_search

QUOTES = '"""'


class LineEditor:
    """Reads a message; `completions` lists the possible arguments of a command."""

    def __init__(
        self,
        history: Path | None,
        commands: Iterable[str],
        completions: Callable[[str], Iterable[str] | None],
    ) -> None:
        self.session: PromptSession[str] = PromptSession(
            history=_history(history),
            key_bindings=_keys(),
            completer=SlashCompleter(commands, completions),
            complete_while_typing=False,
            enable_open_in_editor=True,
            enable_suspend=True,
            tempfile_suffix=".md",
            multiline=Condition(lambda: self._typed and _is_open(self._text)),
            prompt_continuation="  ",
        )
        self._text = ""  # as it was before the last key
        self._typed = self._quotes = False  # opening quotes: typed now; typed now or earlier
        self.session.default_buffer.on_text_changed += self._changed

    def read(self, default: str = "", until: Callable[[], bool] = lambda: False) -> str | None:
        """Returns what was typed; None at end of input, or as soon as `until` is true.

        Ctrl-C on an empty line raises KeyboardInterrupt; else it drops the line and returns "".
        """

        def start() -> None:
            app = self.session.app
            app.create_background_task(end_when(app, lambda: until() or bool(pending)))

        self._text, self._typed, self._quotes = default, False, False
        try:
            with defer(signal.SIGTERM) as pending:
                text = self.session.prompt(
                    FormattedText([("bold ansicyan", "> ")]), default=default, pre_run=start
                )
        except EOFError:
            return None
        except KeyboardInterrupt:
            if self.session.default_buffer.text:
                return ""
            raise
        if self._quotes and not _is_open(text):
            return text.strip()[3:-3].strip("\n")
        return text

    def _changed(self, buffer: Buffer) -> None:
        """Lets typed quotes open a multi-line text; after pasted ones Enter could not send it."""
        before, self._text = self._text, buffer.text
        if not _is_quoted(self._text):
            self._typed = self._quotes = False
        elif not _is_quoted(before):
            self._typed = len(self._text) - len(before) == 1
            self._quotes = self._typed or self._text in self.session.history.get_strings()


class SlashCompleter(Completer):
    """Completes commands, and their arguments: a path where `arguments` returns None."""

    def __init__(
        self, commands: Iterable[str], arguments: Callable[[str], Iterable[str] | None]
    ) -> None:
        self.commands = sorted(commands)
        self.arguments = arguments
        self.paths = PathCompleter(expanduser=True)

    def get_completions(self, document: Document, event: CompleteEvent) -> Iterator[Completion]:
        text = document.text_before_cursor
        if not text.startswith("/") or "\n" in text:
            return
        command, space, typed = text.partition(" ")
        choices = self.arguments(command) if space else self.commands
        if choices is None:
            yield from self.paths.get_completions(Document(typed), event)
            return
        prefix = typed if space else command
        for choice in choices:
            if choice.lower().startswith(prefix.lower()):
                yield Completion(choice, start_position=-len(prefix))


async def end_when(app: Application[Any], condition: Callable[[], bool]) -> None:
    """Ends a prompt, as at the end of input, as soon as the condition is true."""
    while not condition():
        await asyncio.sleep(0.2)
    if not app.is_done:
        app.exit(exception=EOFError)


@contextmanager
def defer(number: signal.Signals) -> Iterator[list[int]]:
    """Defers a signal until the prompt has ended; the list tells the prompt to end.

    The event loop would print what a handler raises, and go on.
    """
    pending: list[int] = []
    before = signal.signal(number, lambda signum, _: pending.append(signum))
    try:
        yield pending
    finally:
        signal.signal(number, before)
        if pending:
            signal.raise_signal(number)


def _is_quoted(text: str) -> bool:
    return text.lstrip().startswith(QUOTES)


def _is_open(text: str) -> bool:
    """Whether a text in triple quotes still lacks the closing ones."""
    text = text.strip()
    return _is_quoted(text) and not (len(text) >= 6 and text.endswith(QUOTES))


def _history(path: Path | None) -> History:
    if path is None:
        return InMemoryHistory()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)
        path.open("r+b").close()
    except OSError:
        return InMemoryHistory()
    return HistoryFile(str(path))


class HistoryFile(FileHistory):
    """A history in a file, which skips what cannot be written."""

    def store_string(self, string: str) -> None:
        with suppress(OSError, UnicodeError):
            super().store_string(string)


def _keys() -> KeyBindings:
    keys = KeyBindings()

    @keys.add("escape", "enter")  # Alt-Enter sends these two keys; prompt_toolkit would submit
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    @keys.add("enter", filter=is_searching)  # prompt_toolkit would only show what was found
    def _(event: KeyPressEvent) -> None:
        wanted = event.current_buffer.text
        accept_search()
        found = event.app.current_buffer
        if wanted and wanted in found.text:
            found.validate_and_handle()

    return keys
